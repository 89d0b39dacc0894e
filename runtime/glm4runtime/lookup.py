"""Draft verification by prompt lookup: several tokens a run where the text repeats itself, and the same tokens always.

Where the last few tokens occurred before, what followed them then is a guess at what follows now. A run over the last
token and the guesses costs little more than a run over one, and gives the logits behind each: as long as the next
token, chosen from its logits like any other, is the one that was guessed, the run's next row is already there.

What is promised: the tokens, greedy or drawn with a seed, are those of ``limit`` 0, which guesses nothing, for every
limit and whatever is accepted. Their logits and the cache are equal to the bit. It stands on two things.

1. From two tokens a run on, a row's bits do not depend on what else is in the run. Only a lone token has kernels of its
   own (4-bit MatMulNBits, GroupQueryAttention), which round differently. Measured on ONNX Runtime 1.32's CPU kernels
   (AVX2) in every precision, for step graphs too, and checked by ``tests/test_lookup.py`` and, in fp32,
   ``tests/test_step_runner.py``; other CPUs, GPUs and TensorRT's engines were not measured.
2. So whether a token is run alone must not depend on guesses. A token is run alone where the pair that it ends is new
   to the text, and among others, if need be beside a filler, where the pair occurred before. That is a rule about the
   text alone, and accepted guesses obey it: each was copied from a place where the same pair stands.

What isn't: decoding without this module runs every token alone, and its logits differ by rounding, as between two
machines: up to 1e-5 in fp32 and 3e-4 in fp16 on the embedded model. In int8 and int4 rounding moves an activation to
another quantization step now and then, and logits by 0.1. Of 61 greedy texts of 200 tokens none parted in fp32 and
fp16, 20 in int8 and 25 in int4, each where the best two logits were within 0.04. Who compares with and without guesses,
or serves both, takes ``limit`` 0 for without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.contract import UserError
from glm4runtime.runner import MAX_RUN, Runner

__all__ = ["MAX_DRAFT", "NgramIndex", "PromptLookup", "check_limit"]

MAX_DRAFT = MAX_RUN - 1
# The longest n-gram found decides. The shortest is also what makes a token one that may be run among others.
_NGRAMS = (4, 3, 2)


class NgramIndex:
    """The tokens so far, and where the last few of them stood before. Constant time a token, about 0.5 kB of memory."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._match: int | None = None  # what followed the last n-gram when it occurred before, as a position
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram: position behind its last occurrence
        for token in tokens:
            self.push(int(token))

    @property
    def repeats(self) -> bool:
        """Whether the last two tokens occurred before, in this order."""
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


class PromptLookup:
    """Stands for a runner's ``decode``, and gets through with fewer runs where the text repeats itself.

    ``runs`` of the decode graph were made, with ``drafted`` guesses in them, of which ``accepted`` proved right.
    """

    def __init__(self, runner: Runner, prompt: Sequence[int], limit: int) -> None:
        """prompt: the tokens in the runner's cache. limit: guesses a run at most, 0 to MAX_DRAFT."""
        self.runs = self.drafted = self.accepted = 0
        self._runner = runner
        self._index = NgramIndex(prompt)
        self._limit = limit
        self._size = min(1, limit)  # guesses in the next run
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
            self._adapt()
            self._run(token)
        row: np.ndarray = self._rows[self._row]
        return row

    def _adapt(self) -> None:
        """Longer drafts after one that was right to its end, shorter ones after one that wasn't.

        Lengths are 1, 3, 7, 15: with the token in front that is an even width, and kernels take rows by twos.
        """
        if not self._draft:
            return
        if self._row < len(self._draft):
            self._size = max(self._size // 2, 1)
        elif 2 * self._size < self._limit:
            self._size = 2 * self._size + 1

    def _run(self, token: int) -> None:
        runner, self._row, self._draft = self._runner, 0, []
        self.runs += 1
        if not self._index.repeats:
            self._rows = runner.decode(token)[None]
            return
        room = runner.max_seq_len - runner.length - 1
        self._draft = self._index.guess(min(self._size, room))
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
