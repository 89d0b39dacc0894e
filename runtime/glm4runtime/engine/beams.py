"""Beam search over slots: each beam has one, and after every step rows move to where their text goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.sampling.beams import BeamSearch
from glm4runtime.sampling.logprobs import log_softmax

if TYPE_CHECKING:
    from glm4runtime.engine.job import Answer, Job
    from glm4runtime.engine.request import FinishReason


class BeamGroup:
    """The beams of one job, which are its answers while the search goes on: ``job.answers[i]`` is beam i."""

    def __init__(self, job: Job) -> None:
        request = job.request
        self._job = job
        self._search = BeamSearch(
            request.num_beams,
            job.stop,
            max_new_tokens=min(request.params.max_new_tokens, job.room(0)),
            length_penalty=request.length_penalty,
        )

    def advance(self, runner: BatchRunner, rows: np.ndarray) -> None:
        """Take the beams one token further: float32 [1, vocab] behind the prompt, later [beams, vocab]."""
        answers = self._job.answers
        parents, tokens = self._search.step(log_softmax(rows))
        if self._search.done:
            self._finish()
            return
        self._move(runner, parents)
        texts = [answers[parent].tokens for parent in parents]
        for answer, text, token in zip(answers, texts, tokens, strict=True):
            answer.tokens = [*text, token]

    def cut(self, reason: FinishReason) -> None:
        """End the search before its end, with the best texts so far."""
        for answer, found in zip(self._job.answers, self._search.best(), strict=False):
            answer.replay(found.tokens, cut=reason)
        for answer in self._job.answers:
            answer.finish(reason)

    def _move(self, runner: BatchRunner, parents: list[int]) -> None:
        """Rows behind the prompt, from each beam to those that continue it; all are read before any is written."""
        answers, first = self._job.answers, len(self._job.ids)
        end = answers[0].rows
        moved = {i: parent for i, parent in enumerate(parents) if i != parent}
        if end == first or not moved:
            return
        blocks = {}
        for parent in set(moved.values()):  # a comprehension that fails would keep the answers (Python 3.11's closure)
            blocks[parent] = runner.read_rows(answers[parent].slot, first, end)
        for i, parent in moved.items():
            runner.write_rows(answers[i].slot, first, blocks[parent])

    def _finish(self) -> None:
        answers: list[Answer] = self._job.answers
        for answer, found in zip(answers, self._search.hypotheses, strict=False):
            answer.replay(found.tokens)
        for answer in answers:
            answer.finish("length")
