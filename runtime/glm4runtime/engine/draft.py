"""Guesses of a draft bundle: a smaller model of the same vocabulary that writes ahead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.contract import BundleError
from glm4runtime.speculation import MAX_DRAFT

_STEPS = 4  # of each kind are timed before guesses can be given up
_REST = 64  # tokens without guesses, once they didn't pay


class DraftModel:
    """Guesses for one slot: the draft's most probable tokens, ``limit`` at most per run.

    Where guesses are right too seldom, none are made for a while: ``accepted`` tokens of a run must make up for the
    draft's own steps, which cost ``cost`` of the big model's run each.
    """

    def __init__(self, runner: BatchRunner, slot: int, tokens: Sequence[int], limit: int, cost: float) -> None:
        """tokens: the text so far. limit: guesses per run, up to MAX_DRAFT. cost: of a step of the draft, in runs of
        the model that verifies.
        """
        self._runner, self._slot = runner, slot
        self._limit = min(limit, MAX_DRAFT)
        self._cost = cost
        self._tokens = list(tokens)
        self._cached: list[int] = []  # tokens whose rows the draft's slot holds
        self._guessed: list[int] = []  # in the last run
        self._begun = 0  # tokens of the text when they were
        self._rate = float(limit)  # right guesses of a run, the last ones counting most
        self._rest = 0

    def reset(self, tokens: Sequence[int] | np.ndarray) -> None:
        """The text is this now."""
        self._tokens = [int(token) for token in tokens]

    def push(self, token: int) -> None:
        """The text has one more token."""
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """The tokens that the draft finds most probable, each behind those before it."""
        self._judge()
        if self._rest:
            self._rest -= 1
            return []
        count = min(self._limit, room, self._runner.max_seq_len - len(self._tokens))
        if count < 1:
            return []
        guesses = [int(self._catch_up().argmax())]
        while len(guesses) < count:
            start = len(self._cached)
            row = self._runner.step([self._slot], [guesses[-1]], [start])[0]
            self._cached.append(guesses[-1])
            guesses.append(int(row.argmax()))
        self._guessed, self._begun = guesses, len(self._tokens)
        return guesses

    def _judge(self) -> None:
        """Look at what became of the last guesses."""
        if not self._guessed:
            return
        came = self._tokens[self._begun : self._begun + len(self._guessed)]
        right = 0
        while right < len(came) and came[right] == self._guessed[right]:
            right += 1
        self._rate = 0.8 * self._rate + 0.2 * right
        if self._rate < self._cost * len(self._guessed):
            self._rest, self._rate = _REST, float(self._limit)
        self._guessed = []

    def _catch_up(self) -> np.ndarray:
        """Compute the rows of the text that the draft lacks; returns the logits behind it, float32 [vocab]."""
        rows, tokens = 0, self._tokens
        while rows < min(len(self._cached), len(tokens) - 1) and self._cached[rows] == tokens[rows]:
            rows += 1
        for _, end in self._runner.prompt_runs(rows, len(tokens)):
            logits = self._runner.prefill(self._slot, tokens[:end], rows)
            rows = end
        self._cached = list(tokens)
        return logits


def require_same_vocabulary(
    model: BatchRunner, draft: BatchRunner, tokenizers: tuple[bytes | None, bytes | None]
) -> None:
    """Raises BundleError where the draft's tokens aren't the model's."""
    if model.vocab_size != draft.vocab_size:
        raise BundleError(
            f"the draft bundle has {draft.vocab_size} tokens, the bundle {model.vocab_size}; a draft must have the "
            "same tokenizer"
        )
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise BundleError("the draft bundle has another tokenizer.json than the bundle; a draft must have the same one")
