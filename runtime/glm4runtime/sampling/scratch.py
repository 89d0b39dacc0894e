"""The memory that samplers work in."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from glm4runtime.sampling.rows import Row
from glm4runtime.sampling.select import Selector


class Scratch:
    """Arrays as wide as a row of logits, each allocated when it's first used: 6.2 MB in all for GLM-4's vocabulary.

    Nothing in them outlasts a sampler's call, so all samplers of one thread can share them.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @cached_property
    def scores(self) -> Row:
        """What processors change: float32 [vocab_size]."""
        return np.empty(self.vocab_size, np.float32)

    @cached_property
    def addends(self) -> NDArray[np.float32]:
        """What a grammar's mask adds to each logit: float32 [mask's bytes, 8]."""
        return np.empty((4 * -(-self.vocab_size // 32), 8), np.float32)

    @cached_property
    def weights(self) -> Row:
        """Unnormalised probabilities: float32 [vocab_size]."""
        return np.empty(self.vocab_size, np.float32)

    @cached_property
    def logs(self) -> Row:
        """Of weights: float32 [vocab_size]."""
        return np.empty(self.vocab_size, np.float32)

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """Sums of weights: float64 [vocab_size]."""
        return np.empty(self.vocab_size, np.float64)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which tokens stay: bool [vocab_size]."""
        return np.empty(self.vocab_size, np.bool_)

    @cached_property
    def selector(self) -> Selector:
        """For up to vocab_size values."""
        return Selector(self.vocab_size)
