"""One slot of a batch, as what guesses ahead wants it: the part of a Runner that prompt lookup drives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.backends.batch import BatchRunner


class SlotRunner:
    """``length`` tokens of a slot are accepted; runs are :meth:`BatchRunner.verify`'s, a single token's too."""

    def __init__(self, runner: BatchRunner, slot: int, length: int) -> None:
        self.max_seq_len = runner.max_seq_len
        self.length = length
        self._runner, self._slot = runner, slot

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab]."""
        row: np.ndarray = self.verify([token])[0]
        self.accept()
        return row

    def verify(self, tokens: Sequence[int]) -> np.ndarray:
        """Look ahead: the logits behind each of the tokens, float32 [len(tokens), vocab]; kept for later reads."""
        return self._runner.verify(self._slot, tokens, self.length).copy()

    def accept(self) -> None:
        """Append the next of the tokens that were looked at."""
        self.length += 1
