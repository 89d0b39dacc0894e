"""A row of logits that stays where it was computed, with what the graph says of its most probable tokens.

A bundle built with ``--output-top-logits`` gives these beside its logits. Where they decide what the next token is, the
row itself, 606 KB for GLM-4's vocabulary, never leaves the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from glm4runtime.backends.runner import Runner


@dataclass(frozen=True)
class HeldRow:
    """Good until the session's next run, as rows are that were fetched."""

    values: np.ndarray  # float32 [count], the largest logits, descending
    ids: np.ndarray  # int64 [count], their tokens; which of equal ones come, and in what order, is the device's affair
    log_sum: float  # of the exponentials of the whole row
    fetch: Callable[[], np.ndarray]  # gives the row, float32 [vocab]


Logits = np.ndarray | HeldRow  # a row, float32 [vocab], or what stands for it


def whole(row: Logits) -> np.ndarray:
    """The row itself, float32 [vocab]."""
    return row.fetch() if isinstance(row, HeldRow) else row


class HeldSteps:
    """A runner's decode and verify, of which rows may be held: a :class:`glm4runtime.speculation.Verifier`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.max_seq_len = runner.max_seq_len

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._runner.length

    def decode(self, token: int) -> Logits:
        """As :meth:`Runner.decode`."""
        return self._runner.step(token, hold=True)

    def verify(self, tokens: Sequence[int]) -> np.ndarray | list[HeldRow]:
        """As :meth:`Runner.verify`."""
        return self._runner.look_ahead(tokens, hold=True)

    def accept(self) -> None:
        """As :meth:`Runner.accept`."""
        self._runner.accept()
