"""Draft verification by prompt lookup: several tokens per run where the text repeats itself.

Where the last few tokens occurred before, what followed them then is a guess at what follows now. A run over the last
token and the guesses costs little more than a run over one, and gives the logits behind each: as long as the next
token, chosen from its logits like any other, is the one that was guessed, the run's next row is already there.

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

import numpy as np

from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.contract import UserError

__all__ = ["MAX_DRAFT", "Counts", "NgramIndex", "PromptLookup", "check_limit"]

MAX_DRAFT = MAX_RUN - 1
_NGRAMS = (6, 5, 4, 3)  # the longest that is found decides
# Guesses for each token before them that agrees with the place they are copied from. By tools/bench_lookup.py; from a
# half to one make no more than 3% of difference.
_TRUST = 2 / 3


class NgramIndex:
    """The tokens so far, and where the last few of them stood before. Constant time and about 0.6 kB per token."""

    def __init__(self, tokens: Sequence[int] | np.ndarray = ()) -> None:
        self.tokens: list[int] = []
        self._match: int | None = None  # what followed the last n-gram when it occurred before, as a position
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram: position behind its last occurrence
        for token in tokens:
            self.push(int(token))

    def push(self, token: int) -> None:
        """Append a token."""
        tokens, followers = self.tokens, self._followers
        tokens.append(token)
        end = len(tokens)
        self._match = None
        for size in _NGRAMS:
            if size <= end:
                ngram = tuple(tokens[-size:])
                if self._match is None:
                    self._match = followers.get(ngram)
                followers[ngram] = end

    def guess(self, count: int) -> list[int]:
        """The ``count`` tokens that followed the last n-gram's most recent earlier occurrence; [] if there's none.

        Where that runs into the present, it goes on with the guesses themselves: the text is taken to be periodic.
        """
        if self._match is None:
            return []
        start, period = self._match, len(self.tokens) - self._match
        return [self.tokens[start + i % period] for i in range(count)]

    def agreement(self, most: int) -> int:
        """How many of the last tokens, ``most`` at most, also stand before the place that :meth:`guess` copies from."""
        if self._match is None:
            return 0
        tokens, here, there = self.tokens, len(self.tokens), self._match
        count = 0
        while count < min(most, there) and tokens[there - 1 - count] == tokens[here - 1 - count]:
            count += 1
        return count


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
    rows: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)  # [1 + len(draft), vocab]


class PromptLookup:
    """Stands for a runner's ``decode``, and gets through with fewer runs where the text repeats itself."""

    def __init__(self, runner: Runner, prompt: Sequence[int] | np.ndarray, limit: int) -> None:
        """prompt: the tokens in the runner's cache. limit: guesses per run at most, 0 (plain decoding) to MAX_DRAFT."""
        self.counts = Counts()
        self._runner = runner
        self._index = NgramIndex(prompt) if limit else None
        self._limit = limit
        self._run = _Run()

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab]. The cache must have room."""
        run, counts, runner = self._run, self.counts, self._runner
        if self._index is not None:
            self._index.push(token)
        if run.accepted < len(run.draft) and run.draft[run.accepted] == token:
            runner.accept()
            run = replace(run, accepted=run.accepted + 1)
            self.counts = replace(counts, accepted=counts.accepted + 1)
        else:
            draft = self._guess(runner.max_seq_len - runner.length - 1)
            run = _Run(draft, 0, runner.verify([token, *draft]) if draft else runner.decode(token)[None])
            if draft:
                runner.accept()
            self.counts = replace(counts, runs=counts.runs + 1, drafted=counts.drafted + len(draft))
        self._run = run
        row: np.ndarray = run.rows[run.accepted]
        return row

    def _guess(self, room: int) -> tuple[int, ...]:
        """Guesses for the next run, ``room`` at most: the more, the longer the text agreed with its earlier place.

        Lengths are 1, 3, 7, 15: with the token in front that is an even width, and kernels take rows by twos.
        """
        if self._index is None:
            return ()
        trusted = self._index.agreement(int(MAX_DRAFT / _TRUST) + 1) * _TRUST
        size = 1
        while 2 * size + 1 <= min(self._limit, trusted):
            size = 2 * size + 1
        return tuple(self._index.guess(min(size, self._limit, room)))

    def state(self) -> tuple[_Run, Counts]:
        """What :meth:`restore` takes: everything that :meth:`decode` changes, as it is now."""
        return self._run, self.counts

    def restore(self, state: tuple[_Run, Counts], tokens: Sequence[int] | np.ndarray) -> None:
        """Undo an interrupted :meth:`decode`; ``tokens`` are those in the cache then."""
        self._run, self.counts = state
        self._index = None if self._index is None else NgramIndex(tokens)


def check_limit(limit: int) -> None:
    """Raises UserError where ``limit`` is no number of guesses a run."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= MAX_DRAFT:
        raise UserError(f"lookup: expected a whole number of draft tokens from 0 to {MAX_DRAFT}, found {limit!r}")
