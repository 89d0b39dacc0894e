"""One slot of a batch, as what guesses ahead wants it: the part of a Runner that drafts are verified with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.prompt_runs import lacking
from glm4runtime.engine.run_times import RunTimes


class SlotRunner:
    """``length`` tokens of a slot are accepted; runs are :meth:`BatchRunner.verify`'s, a single token's too."""

    def __init__(self, runner: BatchRunner, slot: int, text: Sequence[int], times: RunTimes) -> None:
        """text: the tokens in the slot. times: what runs take is told to it."""
        self.max_seq_len = runner.max_seq_len
        self._runner, self._slot, self._times = runner, slot, times
        self._text = list(text)
        self._ahead: deque[int] = deque()  # tokens looked at and not accepted

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self._text)

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab]."""
        row: np.ndarray = self.verify([token])[0]
        self.accept()
        return row

    def verify(self, tokens: Sequence[int]) -> np.ndarray:
        """Look ahead: the logits behind each of the tokens, float32 [len(tokens), vocab]; kept for later reads."""
        count, length = len(tokens), self.length
        # Fillers that have no room behind the run are tokens in front of it instead, as a session's are.
        front = max(0, length + count + lacking(count, self._runner.prompt_granule) - self.max_seq_len)
        began = perf_counter()
        run = [*self._text[length - front :], *tokens]
        rows: np.ndarray = self._runner.verify(self._slot, run, length - front)[front:].copy()
        self._times.note(count, perf_counter() - began)
        self._ahead = deque(tokens)
        return rows

    def accept(self) -> None:
        """Append the next of the tokens that were looked at."""
        self._text.append(self._ahead.popleft())
