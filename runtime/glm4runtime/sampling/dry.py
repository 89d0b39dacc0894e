"""DRY, "don't repeat yourself": a penalty for going on with a repetition."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from glm4runtime.sampling.history import History
from glm4runtime.sampling.penalties import Processor, put
from glm4runtime.sampling.rows import Ids, Row

_LARGEST = float(np.finfo(np.float32).max)


class Dry(Processor):
    """DRY: penalises a token by the length of the repetition that it would prolong.

    ``logit - multiplier * base ** (length - allowed_length)`` for lengths of at least ``allowed_length``: those of the
    longest end of the text which occurred before, with the token behind it. Neither that end nor the token has a
    breaker in it. By p-e-w, text-generation-webui's pull request 5677; the exponent is bounded as in llama.cpp's
    ``llama_sampler_dry_apply``.

    ``_repeats[d]`` is how many of the last tokens are the same as those ``d`` places before. A further token makes it
    one more or nothing, so a step takes time by the text's length, whatever repeats itself in it.
    """

    def __init__(self, multiplier: float, base: float, allowed_length: int, breakers: Collection[int]) -> None:
        # No float64 holds an integer like 10 ** 400.
        self._multiplier, self._base = float(min(multiplier, _LARGEST)), float(min(base, _LARGEST))
        self._allowed = allowed_length
        self._most = int(np.log(_LARGEST) / np.log(self._base)) if self._base > 1.000001 else 0  # 1 ** n needs no bound
        self._breakers = np.array(sorted(breakers), np.int64)
        self._repeats = np.zeros(0, np.int32)
        self._seen = 0  # tokens of the text that `_repeats` is about
        self._unbroken = 0  # of its last tokens, those behind the last breaker

    def __call__(self, scores: Row, history: History) -> None:
        self._follow(history.tokens)
        tokens = history.tokens
        if self._unbroken < self._allowed:
            return
        back = 1 + np.flatnonzero(self._repeats[1 : len(tokens)] >= self._allowed)
        following = tokens[len(tokens) - back]
        free = ~np.isin(following, self._breakers)
        following, lengths = following[free], np.minimum(self._repeats[back[free]], self._unbroken)
        order = np.argsort(lengths, kind="stable")  # the longest last: it counts
        following, lengths = following[order], lengths[order]
        with np.errstate(over="ignore"):
            penalties = self._multiplier * self._base ** np.minimum(lengths - self._allowed, self._most).astype(float)
            put(scores, following, scores[following] - penalties)

    def forget(self) -> None:
        self._seen = 0

    def _follow(self, tokens: Ids) -> None:
        """Take in the tokens behind those seen."""
        if len(tokens) > len(self._repeats):
            more = np.zeros(2 * len(tokens) - len(self._repeats), np.int32)
            self._repeats = np.concatenate([self._repeats, more])
        if not self._seen and len(tokens):
            self._repeats[:] = 0
            self._repeats[: len(tokens)] = _repeats(tokens.tolist())
            broken = np.flatnonzero(np.isin(tokens, self._breakers))
            self._unbroken = len(tokens) - 1 - int(broken[-1]) if broken.size else len(tokens)
            self._seen = len(tokens)
        for at in range(self._seen, len(tokens)):
            token = tokens[at]
            repeats = self._repeats[1 : at + 1]
            repeats += 1
            repeats *= tokens[:at][::-1] == token
            self._unbroken = 0 if (self._breakers == token).any() else self._unbroken + 1
        self._seen = len(tokens)


def _repeats(tokens: list[int]) -> list[int]:
    """Of each distance but 0, how many of the last tokens are the same as those so far before: [len(tokens)].

    The Z-function of the reversed text (Gusfield, Algorithms on Strings, section 1.4): linear time.
    """
    text, size = tokens[::-1], len(tokens)
    found, left, right = [0] * size, 0, 0
    for at in range(1, size):
        same = min(right - at, found[at - left]) if at < right else 0
        while at + same < size and text[same] == text[at + same]:
            same += 1
        found[at] = same
        if at + same > right:
            left, right = at, at + same
    return found
