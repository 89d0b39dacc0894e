"""How long runs take. Noise and warming up only ever add, so the fastest of the last few counts."""

from __future__ import annotations

from collections import deque

_KEPT = 8


class Fastest:
    """Of the last few measurements, in seconds; ``value`` is None until there were two: the first may warm up."""

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=_KEPT)

    def note(self, seconds: float) -> None:
        """Count a measurement."""
        self._kept.append(seconds)

    @property
    def value(self) -> float | None:
        return min(self._kept) if len(self._kept) > 1 else None


class RunTimes:
    """Of runs over one sequence by their number of tokens: a line through what was measured."""

    def __init__(self) -> None:
        self._lone, self._further = Fastest(), Fastest()

    @property
    def lone(self) -> float | None:
        """Seconds of a run of one token; None until that's known."""
        return self._lone.value

    def note(self, tokens: int, seconds: float) -> None:
        """A run of so many tokens took so long."""
        if tokens == 1:
            self._lone.note(seconds)
        elif self.lone is not None:
            self._further.note(max(0.0, seconds - self.lone) / (tokens - 1))

    def seconds(self, tokens: int) -> float:
        """What a run of so many tokens should take; as much as a lone one's where none had more."""
        return (self.lone or 0.0) + (tokens - 1) * (self._further.value or 0.0)
