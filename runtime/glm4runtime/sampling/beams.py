"""Beam search: which beams go on, which are answers. Scores and tokens only; the cache's rows are the caller's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glm4runtime.contract import UserError
from glm4runtime.sampling.rows import largest


@dataclass(frozen=True)
class Hypothesis:
    """An answer that is finished."""

    tokens: tuple[int, ...]  # with its stop token, where one ended it
    score: float  # the sum of its tokens' log-probabilities / len(tokens) ** length_penalty


@dataclass(frozen=True)
class _Beam:
    """A text under way, or one that just ended."""

    score: np.float32  # the sum of its tokens' log-probabilities
    parent: int
    tokens: tuple[int, ...]


class BeamSearch:
    """Beam search for one prompt as ``GenerationMixin._beam_search`` of transformers (5.24) does it.

    Each call of :meth:`step` takes the log-probabilities behind every beam and says which beams go on with which
    tokens, until :attr:`done`. Sums are float32, as transformers'.
    """

    def __init__(
        self,
        beams: int,
        stop: Collection[int],
        *,
        max_new_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        """early_stopping: True ends with as many answers as beams; False where no beam at its present length, "never"
        where no beam at any length would be better than the worst answer.

        Raises UserError for values that make no sense.
        """
        if beams < 2:
            raise UserError(f"beams: expected at least 2, found {beams}")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        if early_stopping not in (True, False, "never"):
            raise UserError(f'early_stopping: expected True, False or "never", found {early_stopping!r}')
        self.done = False
        self._beams = beams
        self._stop = frozenset(stop)
        # So many that, with a stop token behind every beam, `beams` are left to go on.
        self._candidates = max(2, 1 + len(self._stop)) * beams
        self._max_new_tokens = max_new_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._running = [_Beam(np.float32(0), 0, ())]
        self._finished: list[Hypothesis] = []  # the best first, `beams` at most

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The answers so far, the best first; as many as beams once the search is done."""
        return tuple(self._finished)

    def best(self) -> tuple[Hypothesis, ...]:
        """The answers and the texts under way, the best first, as many as beams: what a search has that is cut."""
        under_way = [
            Hypothesis(beam.tokens, float(self._scored(beam.score, len(beam.tokens))))
            for beam in self._running
            if beam.tokens
        ]
        return tuple(sorted([*self._finished, *under_way], key=lambda text: -text.score)[: self._beams])

    def step(self, log_probs: NDArray[np.float32]) -> tuple[list[int], list[int]]:
        """Take the beams one token further.

        Args:
            log_probs: float32 [rows, vocab], natural logarithms, read only. The first step has one row, the prompt's;
                every later one as many as there are beams, in the order of the last step's answer.

        Returns:
            Of each beam from now on: the row that it continues, and the token that it continues it with. At the end,
            when :attr:`done` is set, they are of no more use.

        Raises:
            RuntimeError: the search is done.
            ValueError: another number of rows.
            UserError: the vocabulary is too small for so many beams and stop tokens.
        """
        if self.done:
            raise RuntimeError("the beam search is done")
        rows, vocab_size = log_probs.shape
        if rows != len(self._running):
            raise ValueError(f"log_probs: expected {len(self._running)} rows, one a beam, found {rows}")
        if vocab_size < self._candidates:
            raise UserError(
                f"{self._beams} beams and {len(self._stop)} stop tokens need a vocabulary of {self._candidates} "
                f"tokens, found {vocab_size}; ask for fewer beams"
            )
        length = len(self._running[0].tokens) + 1
        candidates = self._best(log_probs)
        ended = [length == self._max_new_tokens or beam.tokens[-1] in self._stop for beam in candidates]
        self._finish([beam for beam, end in zip(candidates[: self._beams], ended, strict=False) if end], length)
        going_on = [beam for beam, end in zip(candidates, ended, strict=True) if not end][: self._beams]
        self.done = not going_on or self._no_better(going_on[0].score, length)
        self._running = going_on
        return [beam.parent for beam in going_on], [beam.tokens[-1] for beam in going_on]

    def _best(self, log_probs: NDArray[np.float32]) -> list[_Beam]:
        """The most probable continuations of all beams, descending."""
        found = []
        for parent, (beam, row) in enumerate(zip(self._running, log_probs, strict=True)):
            ids = largest(row, self._candidates)
            scores = row[ids] + beam.score
            found += [
                _Beam(score, parent, (*beam.tokens, token)) for score, token in zip(scores, ids.tolist(), strict=True)
            ]
        return sorted(found, key=lambda beam: -beam.score)[: self._candidates]

    def _finish(self, beams: list[_Beam], length: int) -> None:
        new = [Hypothesis(beam.tokens, float(self._scored(beam.score, length))) for beam in beams]
        self._finished = sorted([*self._finished, *new], key=lambda answer: -answer.score)[: self._beams]

    def _no_better(self, best: np.float32, length: int) -> bool:
        """Whether the best beam that goes on can't come among the answers any more, by transformers' reckoning."""
        if len(self._finished) < self._beams:
            return False
        if self._early_stopping is True:
            return True
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_new_tokens
        return float(self._scored(best, length)) <= self._finished[-1].score

    def _scored(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(length**self._length_penalty))
