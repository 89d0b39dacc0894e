"""Several tokens per run: guesses at what follows, verified together.

A run over the last token and some guesses costs little more than a run over one, and gives the logits behind each: as
long as the next token, chosen from its logits like any other, is the one that was guessed, the run's next row is
already there. Where guesses come from is another matter: :mod:`glm4runtime.lookup` copies them from the text itself.

Every token is chosen from its own logits, so the text is the model's, whatever is guessed. But a row's last bits depend
on the run that computes it (:mod:`glm4runtime.backends.invariance`): in fp32 and fp16 by up to 1e-5 and 3e-4 in the
logits, in int8 and int4 by up to 0.2. So where two logits lie that close, a text with guesses may part from the text
without: of 61 greedy texts of 200 tokens none did in fp32 and fp16, 20 in int8 and 25 in int4, each within 0.04. With
``load(..., invariant=True)`` tokens, logits and cache are the same to the bit for every ``limit``, at the price of a
second row in each run of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from glm4runtime.backends.runner import MAX_RUN
from glm4runtime.contract import UserError

__all__ = ["MAX_DRAFT", "Counts", "Guesses", "Speculation", "Verifier", "check_limit"]

MAX_DRAFT = MAX_RUN - 1


class Guesses(Protocol):
    """Says what may follow a text."""

    def push(self, token: int) -> None:
        """The text has one more token."""

    def guess(self, room: int) -> Sequence[int]:
        """What may follow, ``room`` tokens at most, and at most MAX_DRAFT; often nothing."""

    def reset(self, tokens: Sequence[int] | np.ndarray) -> None:
        """The text is this now."""


Row_co = TypeVar("Row_co", covariant=True)  # a row of logits, float32 [vocab], or what stands for it
Row = TypeVar("Row")


class Rows(Protocol[Row_co]):
    """The rows of a run, by their places in it."""

    def __getitem__(self, index: int, /) -> Row_co: ...


class Verifier(Protocol[Row_co]):
    """The part of a :class:`~glm4runtime.backends.runner.Runner` that runs guesses."""

    max_seq_len: int

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    def decode(self, token: int) -> Row_co:
        """Append one token; its logits, float32 [vocab]."""

    def verify(self, tokens: Sequence[int]) -> Rows[Row_co]:
        """The logits behind each token, float32 [len(tokens), vocab]; they aren't appended."""

    def accept(self) -> None:
        """Append the next of them."""


@dataclass(frozen=True)
class Counts:
    """``runs`` of steps were made, with ``drafted`` guesses in them, of which ``accepted`` proved right."""

    runs: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class _Run:
    """A run of steps: its draft, and how many of its tokens are in the text."""

    draft: tuple[int, ...] = ()
    accepted: int = 0
    rows: Rows[Any] = field(default=(), compare=False)  # 1 + len(draft) of them


class Speculation(Generic[Row]):
    """Stands for a runner's ``decode``, and gets through with fewer runs where guesses are right."""

    def __init__(self, runner: Verifier[Row], guesses: Guesses) -> None:
        """guesses: they know the text in the runner's cache."""
        self.counts = Counts()
        self._runner, self._guesses = runner, guesses
        self._run = _Run()

    def decode(self, token: int) -> Row:
        """Append one token; returns its logits, float32 [vocab]. The cache must have room."""
        run, counts, runner = self._run, self.counts, self._runner
        self._guesses.push(token)
        if run.accepted < len(run.draft) and run.draft[run.accepted] == token:
            runner.accept()
            run = replace(run, accepted=run.accepted + 1)
            self.counts = replace(counts, accepted=counts.accepted + 1)
        else:
            draft = tuple(self._guesses.guess(runner.max_seq_len - runner.length - 1))
            run = _Run(draft, 0, runner.verify([token, *draft]) if draft else [runner.decode(token)])
            if draft:
                runner.accept()
            self.counts = replace(counts, runs=counts.runs + 1, drafted=counts.drafted + len(draft))
        self._run = run
        row: Row = run.rows[run.accepted]
        return row

    def state(self) -> tuple[_Run, Counts]:
        """What :meth:`restore` takes: everything that :meth:`decode` changes, as it is now."""
        return self._run, self.counts

    def restore(self, state: tuple[_Run, Counts], tokens: Sequence[int] | np.ndarray) -> None:
        """Undo an interrupted :meth:`decode`; ``tokens`` are those in the cache then."""
        self._run, self.counts = state
        self._guesses.reset(tokens)


def check_limit(limit: int, name: str = "lookup") -> None:
    """Raises UserError where ``limit`` is no number of guesses a run; ``name`` is what errors call it."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= MAX_DRAFT:
        raise UserError(f"{name}: expected a whole number of draft tokens from 0 to {MAX_DRAFT}, found {limit!r}")
