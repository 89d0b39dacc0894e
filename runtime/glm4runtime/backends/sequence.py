"""A sequence: its tokens, and what of them the cache holds. It knows neither weights nor devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.contract import UserError


class TokenSequence:
    """The tokens whose keys and values are in a cache, a row each, and how those rows came there.

    ``length`` tokens are in the cache, of which the first ``exact`` rows have the bits that a prompt's own runs write:
    decode steps compute theirs with other kernels, and often with other weights. ``ahead`` tokens behind ``length``
    were looked at and may be accepted. ``epoch`` counts rewinds, so that a generation notices when its rows were taken.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: the most tokens that it can have."""
        self.length = self.ahead = self.exact = self.epoch = 0
        self._tokens = np.zeros(capacity, np.int64)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens in the cache, int64 [length]: a view, good until the next change."""
        return self._tokens[: self.length]

    def written(self, first: int, end: int) -> np.ndarray:
        """Tokens as recorded, int64 [end - first]: those in the cache, and behind them those about to be."""
        return self._tokens[first:end]

    def record(self, tokens: Sequence[int] | np.ndarray, start: int) -> None:
        """Note the tokens that rows from ``start`` on are about to have; nothing that was ahead is any more."""
        ids = np.asarray(tokens, np.int64)
        self.ahead = 0
        self._tokens[start : start + len(ids)] = ids

    def overwrite(self, first: int) -> None:
        """A run is about to write from row ``first`` on, in a way of its own: an interrupt leaves any part of it."""
        self.exact = min(self.exact, first)

    def extend(self, first: int, end: int, *, exact: bool) -> None:
        """A run has written rows ``first`` to ``end``; ``exact``: as a prompt's own runs do, given such rows before."""
        self.length = max(self.length, end)
        if exact and first <= self.exact:
            self.exact = max(self.exact, end)

    def accept(self) -> None:
        """Append the next of the tokens looked at. Raises ValueError where none is left."""
        if not self.ahead:
            raise ValueError("accept: no verified token is left; verify some, or decode")
        self.ahead, self.length = self.ahead - 1, self.length + 1

    def rewind(self, length: int = 0) -> None:
        """Keep the first ``length`` tokens only. Raises UserError where there are fewer."""
        if not 0 <= length <= self.length:
            raise UserError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.epoch += 1  # and the rest in an order of which an interrupt may leave any part
        self.exact = min(self.exact, length)
        self.ahead, self.length = 0, length

    def common_prefix(self, ids: np.ndarray) -> int:
        """How many tokens at the beginning of ``ids``, int64 [n], are those in the cache."""
        count = min(self.length, len(ids))
        differs = np.flatnonzero(self._tokens[:count] != ids[:count])
        return int(differs[0]) if len(differs) else count

    def state(self) -> tuple[int, int]:
        """What :meth:`restore` takes: the sequence as it is now."""
        return self.length, self.ahead

    def restore(self, state: tuple[int, int]) -> None:
        """Undo an interrupted call: nothing below ``length`` was given other tokens since :meth:`state` was asked.

        ``exact`` stays as it is: the call may have written rows that it didn't come to append.
        """
        self.length, self.ahead = state
