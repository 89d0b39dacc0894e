"""What the engine computes between two looks at its mail.

A step has at most one run of one prompt, then one run over every answer under way, then a run of its own for each
answer that guesses ahead. A run that fails takes down whom it was for and nobody else: a step over several rows is
then made again row by row, which gives the same bits.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.runner import MAX_RUN
from glm4runtime.engine.beams import BeamGroup
from glm4runtime.engine.draft import Draft
from glm4runtime.engine.job import Answer, Job
from glm4runtime.engine.prefix import PrefixStore
from glm4runtime.engine.run_times import RunTimes
from glm4runtime.engine.slot_runner import SlotRunner
from glm4runtime.lookup import PromptLookup
from glm4runtime.sampling.logprobs import log_probabilities
from glm4runtime.speculation import Guesses, Speculation
from glm4runtime.text.structure import Matcher, fill_masks


class Loop:
    """Runs the graphs for answers, and chooses their tokens. One thread owns it."""

    def __init__(
        self, runner: BatchRunner, store: PrefixStore | None, *, keep_answers: bool, draft: Draft | None = None
    ) -> None:
        """store: of prompts' rows; None keeps none. keep_answers: keep rows that answers' own steps wrote, too.
        draft: for answers that want its guesses.
        """
        self.draft = draft
        self.runner, self.store, self.keep_answers = runner, store, keep_answers
        self.failed: dict[Answer, Exception] = {}  # since the last look
        self.failures_in_a_row = 0  # runs; none has worked since
        self._masks = ThreadPoolExecutor(1, "glm4-masks")

    def close(self) -> None:
        """Free graphs and cache."""
        self._masks.shutdown()
        self.runner.close()
        if self.draft is not None:
            self.draft.close()

    def admit(self, answer: Answer, slot: int, *, shared: bool = False) -> int:
        """Give an answer its slot, with what the store has of its prompt; returns how many rows that is.

        shared: none, since another one of its request is about to :meth:`share` its prompt.
        """
        job = answer.job
        answer.slot, answer.rows = slot, 0
        self.runner.use_adapter(slot, job.request.adapter)
        if shared or self.store is None or job.request.prompt_logprobs is not None:  # these need every row's logits
            return 0
        try:
            with self.store.match(job.ids, job.salt, len(job.ids) - 1) as hit:  # the last one's logits are wanted
                for first, block in hit:
                    self.runner.write_rows(slot, first, block)
                answer.rows = hit.rows
        except Exception as error:
            self._fail(answer, error)
            return 0
        if answer is job.answers[0]:  # what others of its request find was computed for this one
            job.feed.usage = replace(job.feed.usage, cached_tokens=answer.rows)
        return answer.rows

    def share(self, source: Answer, answer: Answer) -> None:
        """Give an answer the prompt that another one of its request has computed."""
        try:
            self.runner.copy_rows(source.slot, answer.slot, len(answer.job.ids))
        except Exception as error:
            self._fail(answer, error)
            return
        self._begin(answer)

    def prefill(self, answer: Answer, width: int) -> int:
        """One run of an answer's prompt, of about ``width`` tokens; returns how many more are done, 0 if it failed."""
        job, runner, before = answer.job, self.runner, answer.rows
        if answer in self.failed:  # since it was given its slot
            return 0
        try:
            if job.request.prompt_logprobs is not None:
                self._scored_run(answer, job.request.prompt_logprobs)
            else:
                _, end = runner.prompt_runs(before, len(job.ids), width)[0]
                logits = runner.prefill(answer.slot, job.ids[:end], before)
                answer.rows = end
                if not answer.in_prompt:
                    job.prompt_logits = logits.copy()
            self.failures_in_a_row = 0
        except Exception as error:
            self._fail(answer, error)
            return 0
        if not answer.in_prompt:
            self._begin(answer)
            if answer not in self.failed:  # rows that gave no numbers would spoil other requests'
                self._keep(answer, job.ids)
        return answer.rows - before

    def decode(self, answers: list[Answer]) -> None:
        """One more token for each."""
        under_way = set(answers)
        together = [
            answer
            for answer in answers
            if answer.speculation is None and (answer.job.beams is None or under_way.issuperset(answer.job.answers))
        ]
        masks = self._start_masks([answer.matcher for answer in answers if answer.matcher is not None])
        if together:
            try:
                rows = self._step(together)
            except Exception as error:
                if len(together) == 1:
                    self._fail(together[0], error)
                    together = []
                else:
                    together, rows = self._one_by_one(together)
        if masks is not None:
            try:
                masks.result()
            except Exception as error:
                self.failed.update((answer, error) for answer in answers if answer.matcher is not None)
        if together:
            self._take(together, rows)
        for answer in answers:
            if answer.speculation is not None:
                self._look_ahead(answer, answer.speculation)

    def end(self, answer: Answer) -> None:
        """Let go of an answer's slot; its rows stay in the store where that is wanted."""
        if answer.slot < 0:
            return
        # A beam's tokens are its search's best in the end, and not those in its slot.
        if self.keep_answers and not answer.in_prompt and answer.job.beams is None and answer not in self.failed:
            self._keep(answer, np.append(answer.job.ids, answer.tokens)[: answer.rows])
        self.runner.release(answer.slot)
        if self.draft is not None:
            self.draft.release(answer.slot)
        answer.slot = -1

    def _start_masks(self, matchers: list[Matcher]) -> Future[None] | None:
        """Have masks filled while the graph runs."""
        if not matchers:
            return None
        try:
            return self._masks.submit(fill_masks, matchers)
        except RuntimeError:  # the main thread has ended, and executors with it; others still read their answers
            fill_masks(matchers)
            return None

    def _step(self, answers: list[Answer]) -> np.ndarray:
        """The logits behind each answer's last token, float32 [answers, vocab]. Raises what the graph raises."""
        tokens = [answer.tokens[-1] for answer in answers]
        rows = self.runner.step([a.slot for a in answers], tokens, [a.rows for a in answers])
        self.failures_in_a_row = 0
        return rows

    def _one_by_one(self, answers: list[Answer]) -> tuple[list[Answer], np.ndarray]:
        """The same for those whose own run doesn't fail."""
        rows: dict[Answer, np.ndarray] = {}
        for answer in answers:
            try:
                rows[answer] = self._step([answer])[0].copy()
            except Exception as error:
                self._fail(answer, error)
        return list(rows), np.array(list(rows.values()))

    def _take(self, answers: list[Answer], rows: np.ndarray) -> None:
        """Choose each answer's next token from its row."""
        places = {answer: place for place, answer in enumerate(answers)}
        for answer, place in places.items():
            answer.rows += 1
            if answer.job.beams is None:
                self._choose(answer, rows[place])
        for job in {id(answer.job): answer.job for answer in answers}.values():
            if job.beams is not None and all(beam in places for beam in job.answers):  # else one failed: all do
                self._advance(job, job.beams, rows[[places[beam] for beam in job.answers]])

    def _advance(self, job: Job, beams: BeamGroup, rows: np.ndarray) -> None:
        try:
            beams.advance(self.runner, rows)
        except Exception as error:
            self._fail(job.answers[0], error)

    def _look_ahead(self, answer: Answer, speculation: Speculation[np.ndarray]) -> None:
        try:
            row = speculation.decode(answer.tokens[-1])
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
        if job.feed.timing.first_token is None:
            job.note(first_token=time.monotonic())
        try:
            answer.speculation = self._speculation(answer)
            if answer.matcher is not None:
                fill_masks([answer.matcher])
        except Exception as error:
            self.failed[answer] = error
            return
        if job.beams is None:
            self._choose(answer, job.prompt_logits)
        elif all(beam.slot >= 0 and not beam.in_prompt for beam in job.answers):
            self._advance(job, job.beams, job.prompt_logits[None])

    def _speculation(self, answer: Answer) -> Speculation[np.ndarray] | None:
        request, text = answer.job.request, answer.job.ids.tolist()
        times = RunTimes() if self.draft is None else self.draft.model
        guesses: Guesses
        if request.draft and self.draft is not None:
            guesses = self.draft.guesses(answer.slot, text, request.draft)
        elif request.lookup:
            guesses = PromptLookup(text, min(request.lookup, self.runner.draft_rows - 1))
        else:
            return None
        return Speculation(SlotRunner(self.runner, answer.slot, text, times), guesses)

    def _choose(self, answer: Answer, logits: np.ndarray) -> None:
        if answer in self.failed:
            return
        try:
            answer.choose(logits)
        except Exception as error:  # no numbers, or a grammar that allows nothing: this answer's own
            self.failed[answer] = error

    def _fail(self, answer: Answer, error: Exception) -> None:
        self.failures_in_a_row += 1
        self.failed[answer] = error

    def _scored_run(self, answer: Answer, alternatives: int) -> None:
        """Up to MAX_RUN prompt tokens in a run that gives every row's logits."""
        job, start = answer.job, answer.rows
        run = job.ids[start : start + MAX_RUN].tolist()
        rows = self.runner.verify(answer.slot, run, start)
        for at, row in enumerate(rows, start + 1):
            if len(job.prompt_logprobs) < at < len(job.ids):  # else known: an answer before this one had its own run
                job.prompt_logprobs += log_probabilities(row[None], job.ids[at : at + 1], alternatives)
        answer.rows = start + len(run)
        job.prompt_logits = rows[-1].copy()

    def _keep(self, answer: Answer, ids: np.ndarray) -> None:
        if self.store is None or answer.job.request.prompt_logprobs is not None:
            return
        runner, slot = self.runner, answer.slot
        with contextlib.suppress(Exception):  # the answer is right without: say there's no memory for a copy
            self.store.insert(ids, lambda first, end: runner.read_rows(slot, first, end), answer.job.salt)
