"""What the engine computes between two looks at its mail.

A step has at most one run of one prompt, then one run over every answer under way, then a run of its own for each
answer that guesses ahead. A run that fails takes down whom it was for and nobody else: a step over several rows is
then made again row by row, which gives the same bits.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.runner import MAX_RUN
from glm4runtime.engine.job import Answer
from glm4runtime.engine.prefix import PrefixStore
from glm4runtime.engine.slot_runner import SlotRunner
from glm4runtime.lookup import PromptLookup
from glm4runtime.sampling.logprobs import log_probabilities
from glm4runtime.text.structure import fill_masks


class Loop:
    """Runs the graphs for answers, and chooses their tokens. One thread owns it."""

    def __init__(self, runner: BatchRunner, store: PrefixStore | None, *, keep_answers: bool) -> None:
        """store: of prompts' rows; None keeps none. keep_answers: keep rows that answers' own steps wrote, too."""
        self.runner, self.store, self.keep_answers = runner, store, keep_answers
        self.failed: dict[Answer, Exception] = {}  # since the last look
        self.failures_in_a_row = 0  # runs; none has worked since
        self._masks = ThreadPoolExecutor(1, "glm4-masks")

    def close(self) -> None:
        """Free graphs and cache."""
        self._masks.shutdown()
        self.runner.close()

    def admit(self, answer: Answer, slot: int) -> int:
        """Give an answer its slot, with what the store has of its prompt; returns how many rows that is."""
        job = answer.job
        answer.slot, answer.rows = slot, 0
        if self.store is None or job.prompt_logprobs is not None:  # these need every row's logits
            return 0
        grid = self.runner.prompt_grid
        most = (len(job.ids) - 1) // grid * grid
        with self.store.match(job.ids.tolist(), job.salt, most) as hit:
            rows = hit.rows - hit.rows % grid
            for first, block in hit.blocks:
                if first < rows:
                    self.runner.write_rows(slot, first, block)
        answer.rows = rows
        job.feed.usage = replace(job.feed.usage, cached_tokens=max(rows, job.feed.usage.cached_tokens))
        return rows

    def share(self, source: Answer, answer: Answer) -> None:
        """Give an answer the prompt that another one of its request has computed."""
        job = answer.job
        self.runner.copy_rows(source.slot, answer.slot, len(job.ids))
        self._begin(answer)

    def prefill(self, answer: Answer, width: int) -> int:
        """One run of an answer's prompt, of about ``width`` tokens; returns how many more of them are done."""
        job, runner, before = answer.job, self.runner, answer.rows
        try:
            if job.prompt_logprobs is not None:
                self._scored_run(answer)
            else:
                _, end = runner.prompt_runs(before, len(job.ids), width)[0]
                logits = runner.prefill(answer.slot, job.ids[:end], before)
                answer.rows = end
                if not answer.in_prompt:
                    job.prompt_logits = logits.copy()
            self.failures_in_a_row = 0
        except Exception as error:
            self._fail(answer, error)
            return len(job.ids) - before
        if not answer.in_prompt:
            self._keep(answer, job.ids)
            self._begin(answer)
        return answer.rows - before

    def decode(self, answers: list[Answer]) -> None:
        """One more token for each."""
        together = [answer for answer in answers if answer.lookup is None]
        masks = self._masks.submit(fill_masks, [a.matcher for a in answers if a.matcher is not None])
        if together:
            self._step(together, masks)
        masks.result()
        for answer in answers:
            if answer.lookup is not None:
                self._look_ahead(answer)

    def end(self, answer: Answer) -> None:
        """Let go of an answer's slot; its rows stay in the store where that is wanted."""
        if answer.slot < 0:
            return
        if self.keep_answers and not answer.in_prompt:
            self._keep(answer, np.append(answer.job.ids, answer.tokens)[: answer.rows])
        self.runner.release(answer.slot)
        answer.slot = -1

    def _step(self, answers: list[Answer], masks: object) -> None:
        slots, starts = [a.slot for a in answers], [a.rows for a in answers]
        tokens = [a.tokens[-1] for a in answers]
        try:
            rows = self.runner.step(slots, tokens, starts)
            self.failures_in_a_row = 0
        except Exception as error:
            if len(answers) == 1:
                self._fail(answers[0], error)
                return
            for answer in answers:
                self._step([answer], masks)
            return
        masks.result()
        for answer, row in zip(answers, rows, strict=True):
            answer.rows += 1
            self._choose(answer, row)

    def _look_ahead(self, answer: Answer) -> None:
        try:
            row = answer.lookup.decode(answer.tokens[-1])
            self.failures_in_a_row = 0
        except Exception as error:
            self._fail(answer, error)
            return
        answer.rows += 1
        self._choose(answer, row)

    def _begin(self, answer: Answer) -> None:
        """The prompt is in the cache: choose the first token."""
        job = answer.job
        answer.rows = len(job.ids)
        if job.request.lookup:
            slot = SlotRunner(self.runner, answer.slot, answer.rows)
            answer.lookup = PromptLookup(slot, job.ids.tolist(), job.request.lookup)
        if answer.matcher is not None:
            fill_masks([answer.matcher])
        self._choose(answer, job.prompt_logits)
        if job.feed.timing.first_token is None:
            job.note(first_token=time.monotonic())

    def _choose(self, answer: Answer, logits: np.ndarray) -> None:
        try:
            answer.choose(logits)
        except Exception as error:  # no numbers, or a grammar that allows nothing: this answer's own
            self.failed[answer] = error

    def _fail(self, answer: Answer, error: Exception) -> None:
        self.failures_in_a_row += 1
        self.failed[answer] = error

    def _scored_run(self, answer: Answer) -> None:
        """Up to MAX_RUN prompt tokens in a run that gives every row's logits."""
        job, start = answer.job, answer.rows
        run = job.ids[start : start + MAX_RUN].tolist()
        rows = self.runner.verify(answer.slot, run, start)
        for at, row in enumerate(rows, start + 1):
            if at < len(job.ids):
                job.prompt_logprobs.append(log_probabilities(row, int(job.ids[at]), job.request.prompt_logprobs))
        answer.rows = start + len(run)
        job.prompt_logits = rows[-1].copy()

    def _keep(self, answer: Answer, ids: np.ndarray) -> None:
        if self.store is None or answer.job.prompt_logprobs is not None:
            return
        runner, slot = self.runner, answer.slot
        exact = len(ids) // runner.prompt_grid * runner.prompt_grid
        self.store.insert(ids[:exact].tolist(), lambda first, end: runner.read_rows(slot, first, end), answer.job.salt)
