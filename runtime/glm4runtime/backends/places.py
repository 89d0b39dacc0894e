"""Where in a pool of caches each slot's rows are: a step runs over one block of places. Pure.

A step of n slots, filled up to a multiple of the granule, takes the places from 0 on; what its fillers write must harm
nobody. So a pool has granule - 1 places more than slots, and these are in no slot's possession.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm4runtime.backends.prompt_runs import lacking


class Places:
    """``place[slot]`` for ``slots`` slots among ``count`` places, of which granule - 1 are nobody's."""

    def __init__(self, slots: int, granule: int) -> None:
        self.granule = granule
        self.count = slots + granule - 1
        self.place = list(range(slots))
        self._slot: list[int | None] = [*range(slots), *[None] * (granule - 1)]

    def slot(self, place: int) -> int | None:
        """Whose place that is; None for nobody's."""
        return self._slot[place]

    def rows(self, count: int) -> int:
        """Places that a step of ``count`` slots takes, fillers' included."""
        return count + lacking(count, self.granule)

    def moves(self, chosen: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of places to be exchanged, one after the other, before a step of the slots ``chosen``.

        Afterwards these have the first places, in any order, and the fillers behind them are nobody's. Nothing is
        changed yet: :meth:`exchange` does it, a pair at a time.
        """
        owner, count = list(self._slot), len(chosen)
        pairs = []

        def pair(one: int, other: int) -> None:
            owner[one], owner[other] = owner[other], owner[one]
            pairs.append((one, other))

        wanted = set(chosen)
        strays = [place for place in range(count, self.count) if owner[place] in wanted]
        holes = [place for place in range(count) if owner[place] not in wanted]
        for hole, stray in zip(holes, strays, strict=True):
            pair(hole, stray)
        fillers = range(count, self.rows(count))
        free = [place for place in range(fillers.stop, self.count) if owner[place] is None]
        for filler in fillers:
            if owner[filler] is not None:
                pair(filler, free.pop())
        return pairs

    def exchange(self, one: int, other: int) -> None:
        """Note that two places' rows have changed places."""
        self._slot[one], self._slot[other] = self._slot[other], self._slot[one]
        for place in (one, other):
            slot = self._slot[place]
            if slot is not None:
                self.place[slot] = place
