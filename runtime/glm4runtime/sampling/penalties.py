"""Processors: what tokens so far, biases and bans do to a row of logits, before anything is dropped or drawn.

Each changes a few entries of a row in place and costs time by the length of the text, not by the vocabulary's. What was
-inf stays so, and no penalty or bias makes a finite logit infinite: only bans forbid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from glm4runtime.sampling.history import History
from glm4runtime.sampling.rows import Ids, Row

_LIMITS = np.finfo(np.float32)


def put(scores: Row, ids: Ids, values: NDArray[np.floating]) -> None:
    """``scores[ids] = values`` within float32's finite range, but for what is -inf already.

    Where an id comes more than once, its last value counts.
    """
    with np.errstate(under="ignore"):
        finite = np.clip(values, _LIMITS.min, _LIMITS.max).astype(np.float32)
    finite[np.isneginf(scores[ids])] = -np.inf
    scores[ids] = finite


class Processor(ABC):
    """Changes one row of logits by the text so far."""

    @abstractmethod
    def __call__(self, scores: Row, history: History) -> None:
        """Change ``scores`` in place."""

    def forget(self) -> None:  # noqa: B027 (most keep nothing)
        """Drop what was derived from the history, which was cut back."""


class LogitBias(Processor):
    """Adds a number to each of some logits, as transformers' ``SequenceBiasLogitsProcessor`` for single tokens."""

    def __init__(self, ids: Ids, biases: Mapping[int, float]) -> None:
        self._ids, self._biases = ids, np.array(list(biases.values()), np.float64)

    def __call__(self, scores: Row, history: History) -> None:
        put(scores, self._ids, scores[self._ids] + self._biases)


class RepetitionPenalty(Processor):
    """Divides positive logits of the text's tokens, multiplies others: ``RepetitionPenaltyLogitsProcessor``.

    Formula: Keskar et al., CTRL, 2019, section 4.1. Prompt and answer count.
    """

    def __init__(self, penalty: float) -> None:
        # Within float32, so that no infinity meets a zero.
        self._penalty = np.float32(min(max(penalty, float(_LIMITS.tiny)), float(_LIMITS.max)))

    def __call__(self, scores: Row, history: History) -> None:
        found = scores[history.tokens]  # a token that comes twice is read twice, before either is written
        put(scores, history.tokens, np.where(found < 0, found * self._penalty, found / self._penalty))


class AnswerPenalties(Processor):
    """``logit - count * frequency_penalty - (count > 0) * presence_penalty``, counts in the answer alone.

    Formula: OpenAI's API reference, "frequency and presence penalties", which counts what was sampled before.
    """

    def __init__(self, presence: float, frequency: float, vocab_size: int) -> None:
        self._presence, self._frequency = np.float32(presence), np.float32(frequency)
        self._counts = np.zeros(vocab_size, np.float32)
        self._counted = 0  # tokens of the answer

    def __call__(self, scores: Row, history: History) -> None:
        answer = history.answer
        np.add.at(self._counts, answer[self._counted :], 1)
        self._counted = len(answer)
        put(scores, answer, scores[answer] - self._counts[answer] * self._frequency - self._presence)

    def forget(self) -> None:
        self._counts[:] = 0
        self._counted = 0


class NoRepeatNgram(Processor):
    """Forbids what would make an n-gram of the text come again: ``NoRepeatNGramLogitsProcessor``."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, scores: Row, history: History) -> None:
        tokens, size = history.tokens, self._size
        if len(tokens) < size:
            return
        start = tokens[len(tokens) + 1 - size :]  # of the n-gram that the next token completes
        ends = tokens[size - 1 :]
        if size > 1:
            places = np.flatnonzero(tokens[size - 2 : -1] == start[-1])
            for at in range(size - 3, -1, -1):
                places = places[tokens[places + at] == start[at]]
            ends = ends[places]
        scores[ends] = -np.inf


class Ban(Processor):
    """Forbids tokens, until the answer has ``until`` tokens or for good (None).

    transformers' ``MinNewTokensLengthLogitsProcessor`` and ``SuppressTokensLogitsProcessor``.
    """

    def __init__(self, ids: Ids, until: int | None = None) -> None:
        self._ids, self._until = ids, until

    def __call__(self, scores: Row, history: History) -> None:
        if self._until is None or history.answered < self._until:
            scores[self._ids] = -np.inf
