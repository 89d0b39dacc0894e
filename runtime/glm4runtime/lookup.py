"""Draft verification by prompt lookup: several tokens a run where the text repeats itself, and the same tokens always.

Where the last few tokens occurred before, what followed them then is a guess at what follows now. A run over the last
token and the guesses costs little more than a run over one, and gives the logits behind each: as long as the next
token, chosen from its logits like any other, is the one that was guessed, the run's next row is already there.

What is promised: the tokens, greedy or drawn with a seed, are those of plain decoding, which is ``limit`` 0, for every
limit and whatever is accepted. Their logits and the cache are equal to the bit. It stands on two things.

1. From two tokens a run on, a row's bits do not depend on what else is in the run. Only a lone token has kernels of its
   own (4-bit MatMulNBits, GroupQueryAttention), which round differently. Measured on ONNX Runtime 1.32's CPU kernels
   (AVX2) in every precision, for step graphs too, and checked by ``tests/test_lookup.py`` and, in fp32,
   ``tests/test_step_runner.py``; such a runner is :attr:`~glm4runtime.runner.Runner.steady`.
2. So whether a token is run alone must not depend on guesses. A token is run alone where the triple that it ends is new
   to the text, and among others, if need be beside a filler, where the triple occurred before. That is a rule about the
   text alone, and accepted guesses obey it: each was copied from a place where the same triple stands. Plain decoding
   pays for it with a second row where a text repeats itself: by ``tools/bench_lookup.py`` nothing on new prose, and a
   sixth of its speed on an edit or a summary that copies, where guesses more than double it.

A lone token's logits differ by rounding, as between two machines: up to 1e-5 in fp32 and 3e-4 in fp16 on the embedded
model. In int8 and int4 rounding moves an activation to another quantization step now and then, and logits by 0.1. So a
loop over ``Runner.decode``, or another runtime over the same graph, may part from these tokens where the best two
logits are close: of 61 greedy texts of 200 tokens none did in fp32 and fp16, 20 in int8 and 25 in int4, each within
0.04. GPUs and TensorRT's engines were not measured: there plain decoding runs every token alone, and guesses keep the
choice of each token from its logits, and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.contract import UserError
from glm4runtime.runner import MAX_RUN, Runner

__all__ = ["MAX_DRAFT", "NgramIndex", "PromptLookup", "check_limit"]

MAX_DRAFT = MAX_RUN - 1
# The longest n-gram found decides. The shortest is also what makes a token one that may be run among others.
_NGRAMS = (6, 5, 4, 3)
# Guesses for each token before them that agrees with the place they are copied from. By tools/bench_lookup.py; from a
# half to one make no more than 3% of difference.
_TRUST = 2 / 3


class NgramIndex:
    """The tokens so far, and where the last few of them stood before. Constant time a token, about 0.6 kB of memory."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._match: int | None = None  # what followed the last n-gram when it occurred before, as a position
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram: position behind its last occurrence
        for token in tokens:
            self.push(int(token))

    @property
    def repeats(self) -> bool:
        """Whether the last three tokens occurred before, in this order."""
        return self._match is not None

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


class PromptLookup:
    """Stands for a runner's ``decode``, and gets through with fewer runs where the text repeats itself.

    ``runs`` of the decode graph were made, with ``drafted`` guesses in them, of which ``accepted`` proved right.
    """

    def __init__(self, runner: Runner, prompt: Sequence[int], limit: int) -> None:
        """prompt: the tokens in the runner's cache. limit: guesses a run at most, 0 (plain decoding) to MAX_DRAFT."""
        self.runs = self.drafted = self.accepted = 0
        self._runner = runner
        self._index = NgramIndex(prompt)
        self._limit = limit
        self._always_alone = not (limit or runner.steady)
        self._draft: list[int] = []
        self._row = 0  # of the last run's logits: how much of its draft was accepted
        self._rows: np.ndarray  # [1 + len(draft), vocab]

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab]. The cache must have room."""
        self._index.push(token)
        if self._row < len(self._draft) and self._draft[self._row] == token:
            self._row += 1
            self.accepted += 1
            self._runner.accept()
        else:
            self._run(token)
        row: np.ndarray = self._rows[self._row]
        return row

    def _guess(self, room: int) -> list[int]:
        """Guesses for the next run, ``room`` at most: the more, the longer the text agreed with its earlier place.

        Lengths are 1, 3, 7, 15: with the token in front that is an even width, and kernels take rows by twos.
        """
        trusted = self._index.agreement(int(MAX_DRAFT / _TRUST) + 1) * _TRUST
        size = 1
        while 2 * size + 1 <= min(self._limit, trusted):
            size = 2 * size + 1
        return self._index.guess(min(size, self._limit, room))

    def _run(self, token: int) -> None:
        runner, self._row, self._draft = self._runner, 0, []
        self.runs += 1
        if self._always_alone or not self._index.repeats:
            self._rows = runner.decode(token)[None]
            return
        room = runner.max_seq_len - runner.length - 1
        self._draft = self._guess(room)
        self.drafted += len(self._draft)
        if self._draft:
            self._rows = runner.verify([token, *self._draft])
        elif room:
            self._rows = runner.verify([token, token])[:1]  # the second is a filler, never accepted
        else:  # the cache's last row: no room for a filler behind, so run the token in front again
            self._rows = runner.verify([self._index.tokens[-2], token], start=runner.length - 1)[1:]
        runner.accept()


def check_limit(limit: int) -> None:
    """Raises UserError where ``limit`` is no number of guesses a run."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= MAX_DRAFT:
        raise UserError(f"lookup: expected a whole number of draft tokens from 0 to {MAX_DRAFT}, found {limit!r}")
