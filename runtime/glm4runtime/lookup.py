"""Prompt lookup: guesses at what follows, copied from the text itself.

Where the last few tokens occurred before, what followed them then is a guess at what follows now, as in answers that
quote or edit their prompt. :mod:`glm4runtime.speculation` verifies the guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.speculation import MAX_DRAFT

__all__ = ["NgramIndex", "PromptLookup"]

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


class PromptLookup:
    """Guesses out of the text itself: what followed the last few tokens when they stood before."""

    def __init__(self, prompt: Sequence[int] | np.ndarray, limit: int) -> None:
        """prompt: the text so far. limit: guesses per run at most, 0 (none) to MAX_DRAFT."""
        self._limit = limit
        self._index = NgramIndex()
        self.reset(prompt)

    def reset(self, tokens: Sequence[int] | np.ndarray) -> None:
        """The text is this now."""
        if self._limit:
            self._index = NgramIndex(tokens)

    def push(self, token: int) -> None:
        """The text has one more token."""
        if self._limit:
            self._index.push(token)

    def guess(self, room: int) -> list[int]:
        """Guesses for the next run, ``room`` at most: the more, the longer the text agreed with its earlier place.

        Lengths are 1, 3, 7, 15: with the token in front that is an even width, and kernels take rows by twos.
        """
        if not self._limit:
            return []
        trusted = self._index.agreement(int(MAX_DRAFT / _TRUST) + 1) * _TRUST
        size = 1
        while 2 * size + 1 <= min(self._limit, trusted):
            size = 2 * size + 1
        return self._index.guess(min(size, self._limit, room))
