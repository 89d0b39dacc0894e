"""Guesses of a draft bundle: a smaller model of the same tokenizer that writes ahead of one that verifies it.

A run has as many guesses as make a token cheapest, by the seconds that the draft's steps and the model's runs were
measured to take and by how often guesses were right. Where that is none, an answer goes on without them and tries one
run of guesses every 64 tokens.

With guesses right with probability a, each independently, a run of n gives 1 + a + ... + a^n tokens: equation 1 of
Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.runner import MAX_RUN
from glm4runtime.engine.run_times import Fastest, RunTimes

_REST = 64  # tokens without guesses, once they don't pay
_DECAY = 0.8  # of what earlier guesses say about the next ones, at each run
_PRIOR = (4.0, 5.0)  # right ones, of so many, before there were any


class Draft:
    """A draft's runner, with a slot for each of the model's, and what the runs of both take."""

    def __init__(self, runner: BatchRunner, stall_seconds: float) -> None:
        """runner: this object's own from now on. stall_seconds: the longest that a prompt may hold up an answer."""
        self.runner, self.stall_seconds = runner, stall_seconds
        self.model = RunTimes()  # of runs that verify
        self.guess = Fastest()  # seconds of each guess
        self.reading = Fastest()  # seconds of each token of a prompt

    def guesses(self, slot: int, tokens: Sequence[int] | np.ndarray, limit: int) -> DraftModel:
        """Guesses at what follows ``tokens`` in a slot, ``limit`` at most per run; the slot is its own until
        :meth:`release`.
        """
        return DraftModel(self, slot, tokens, limit)

    def release(self, slot: int) -> None:
        """An answer is done: nothing in its slot is needed any more."""
        self.runner.release(slot)

    def close(self) -> None:
        """Free graphs and cache."""
        self.runner.close()


class DraftModel:
    """Guesses for one answer: the tokens that the draft finds most probable, each behind those before it.

    A prompt is read in chunks, one at each call; until that's done there are no guesses. Where a run of the draft
    fails, there are none any more: a request doesn't fail with it.
    """

    def __init__(self, draft: Draft, slot: int, tokens: Sequence[int] | np.ndarray, limit: int) -> None:
        """tokens: the text so far. limit: guesses per run, 1 to MAX_DRAFT."""
        self._draft, self._slot, self._limit = draft, slot, limit
        self._right, self._judged = _PRIOR
        self._rest = 0
        self._trying = False  # one run of guesses, whatever it costs
        self.reset(tokens)

    def reset(self, tokens: Sequence[int] | np.ndarray) -> None:
        """The text is this now."""
        self._tokens = [int(token) for token in tokens]
        self._rows = 0  # of the draft's slot that are this text's
        self._guessed: list[int] = []  # in the last run
        self._begun = 0  # tokens of the text then

    def push(self, token: int) -> None:
        """The text has one more token."""
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """Guesses for the next run, ``room`` at most; [] where they don't pay."""
        self._judge()
        if self._rest:
            self._rest -= 1
            self._trying = not self._rest
            return []
        runner = self._draft.runner
        count = min(self._count(), room, runner.max_seq_len - len(self._tokens) + 1)
        if count < 1:
            return []
        try:
            return self._run(count)
        except Exception:  # what is in its slot now isn't known
            self._limit = 0
            return []

    def _count(self) -> int:
        """How many guesses make a token cheapest. Odd numbers: kernels take rows by twos, as prompt lookup's do."""
        model, limit = self._draft.model, self._limit
        if not limit or model.lone is None:  # the next run tells what one without guesses takes
            return 0
        guess = self._draft.guess.value
        if self._trying or guess is None:
            return limit
        right = self._right / self._judged

        def seconds(count: int) -> float:
            return (count * guess + model.seconds(1 + count)) / float(sum(right**i for i in range(count + 1)))

        count: int = min([0, *range(1, limit + 1, 2)], key=seconds)
        if not count:
            self._rest = _REST
        return count

    def _judge(self) -> None:
        """Look at what became of the last guesses."""
        guessed, came = self._guessed, self._tokens[self._begun :]
        if not guessed:
            return
        right = 0
        while right < min(len(guessed), len(came)) and guessed[right] == came[right]:
            right += 1
        self._right = _DECAY * self._right + right
        self._judged = _DECAY * self._judged + min(right + 1, len(guessed))
        self._rows = self._begun + min(right, len(guessed) - 1)  # nothing was run behind the last guess
        self._guessed = []

    def _run(self, count: int) -> list[int]:
        runner, slot, began = self._draft.runner, self._slot, perf_counter()
        lacking = len(self._tokens) - self._rows
        if lacking > MAX_RUN:
            row = self._read()
            if row is None:
                return []
        else:
            row = runner.verify(slot, self._tokens[self._rows :], self._rows)[-1]
        end = len(self._tokens)
        guesses = [int(row.argmax())]
        while len(guesses) < count:  # not step(): it moves slots about, and one by one they'd change places each time
            guesses.append(int(runner.verify(slot, guesses[-1:], end + len(guesses) - 1)[0].argmax()))
        if lacking <= MAX_RUN:
            self._draft.guess.note((perf_counter() - began) / count)
        self._rows, self._guessed, self._begun, self._trying = end, guesses, end, False
        return guesses

    def _read(self) -> np.ndarray | None:
        """Run a chunk of the text; the logits behind it, float32 [vocab], where that was the last one."""
        draft, began = self._draft, perf_counter()
        width = int(draft.stall_seconds / draft.reading.value) if draft.reading.value else 0
        _, end = draft.runner.prompt_runs(self._rows, len(self._tokens), max(MAX_RUN, width))[0]
        row = draft.runner.prefill(self._slot, self._tokens[:end], self._rows)
        draft.reading.note((perf_counter() - began) / (end - self._rows))
        self._rows = end
        return row if end == len(self._tokens) else None
