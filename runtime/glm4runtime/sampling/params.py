"""How to choose tokens: plain data, checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from glm4runtime.contract import UserError, shown

_PENALTY = "a number from -2 to 2 (0 turns it off)"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token, and when to stop choosing.

    At temperature 0 the most probable token is taken, and top_k, top_p, min_p, typical_p, XTC and seed have no effect;
    penalties, biases and bans have. The names are those of transformers' ``GenerationConfig``, of OpenAI's API
    (``presence_penalty``, ``frequency_penalty``, ``logit_bias``) and of llama.cpp (``xtc_...``, ``dry_...``).
    :mod:`glm4runtime.sampling.sampler` has the order in which they act.

    Raises:
        UserError: a field is of the wrong type, not finite, or out of its range.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off; 0 keeps the most probable token alone
    seed: int | None = None  # None: fresh entropy from the operating system
    max_new_tokens: int = 256
    min_new_tokens: int = 0  # stop tokens are forbidden until so many tokens are there
    min_p: float = 0.0  # drops what is less probable than so many times the most probable token; 0: off
    typical_p: float = 1.0  # keeps the tokens of most typical surprise that together have this probability; 1: off
    xtc_probability: float = 0.0  # how often XTC acts; 0: off
    xtc_threshold: float = 0.1  # XTC drops all tokens that are so probable, but for the least probable of them
    repetition_penalty: float = 1.0  # of tokens in prompt and answer; 1: off
    presence_penalty: float = 0.0  # subtracted from the logit of each token that is in the answer
    frequency_penalty: float = 0.0  # the same times how often it is there
    no_repeat_ngram_size: int = 0  # no n-gram of this size comes twice in prompt and answer; 0: off
    dry_multiplier: float = 0.0  # DRY penalises what would go on with a repetition; 0: off
    dry_base: float = 1.75  # how fast that penalty grows with the repetition's length
    dry_allowed_length: int = 2  # repetitions shorter than this are free; of this, dry_multiplier is subtracted
    dry_sequence_breakers: Sequence[int] = ()  # ids of tokens that no repetition goes over, such as a new line's
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token id: added to its logit
    banned_tokens: Sequence[int] = ()  # ids that never come
    forced_tokens: Sequence[int] = ()  # ids that the answer begins with

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, "a finite number >= 0", low=0)
        _check("top_k", self.top_k, Integral, "an integer >= 0 (0 turns it off)", low=0)
        _check("top_p", self.top_p, Real, "a number from 0 to 1 (1 turns it off)", low=0, high=1)
        if self.seed is not None:
            _check("seed", self.seed, Integral, "an integer >= 0, or None for a fresh one", low=0)
        _check("max_new_tokens", self.max_new_tokens, Integral, "an integer >= 1", low=1)
        most = self.max_new_tokens
        expected = f"an integer from 0 to max_new_tokens={most}"
        _check("min_new_tokens", self.min_new_tokens, Integral, expected, low=0, high=most)
        _check("min_p", self.min_p, Real, "a number from 0 to 1 (0 turns it off)", low=0, high=1)
        smallest = math.ulp(0.0)
        expected = "a number above 0 and at most 1 (1 turns it off)"
        _check("typical_p", self.typical_p, Real, expected, low=smallest, high=1)
        _check("xtc_probability", self.xtc_probability, Real, "a number from 0 to 1 (0 turns it off)", low=0, high=1)
        _check("xtc_threshold", self.xtc_threshold, Real, "a number from 0 to 1", low=0, high=1)
        expected = "a finite number above 0 (1 turns it off)"
        _check("repetition_penalty", self.repetition_penalty, Real, expected, low=smallest)
        _check("presence_penalty", self.presence_penalty, Real, _PENALTY, low=-2, high=2)
        _check("frequency_penalty", self.frequency_penalty, Real, _PENALTY, low=-2, high=2)
        expected = "an integer >= 0 (0 turns it off)"
        _check("no_repeat_ngram_size", self.no_repeat_ngram_size, Integral, expected, low=0)
        _check("dry_multiplier", self.dry_multiplier, Real, "a finite number >= 0 (0 turns it off)", low=0)
        _check("dry_base", self.dry_base, Real, "a finite number >= 1", low=1)
        _check("dry_allowed_length", self.dry_allowed_length, Integral, "an integer >= 1", low=1)
        # Copies: what the caller does with a list or dict later changes nothing here.
        for name in ("dry_sequence_breakers", "banned_tokens", "forced_tokens"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if len(self.forced_tokens) > most:
            raise UserError(f"forced_tokens: {len(self.forced_tokens)} tokens are more than max_new_tokens={most}")


def _check(name: str, value: Any, kind: type, expected: str, low: float, high: float = math.inf) -> None:
    # bool is an int to Python, but `top_k=True` is a mistake. NaN fails both comparisons.
    good_kind = isinstance(value, kind) and not isinstance(value, bool)
    if not good_kind or not low <= value <= high or abs(value) == math.inf:
        raise UserError(f"{name}: expected {expected}, found {value!r}")


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise UserError(f"{name}: expected token ids, found {shown(ids)}")
    items = tuple(ids)
    for item in items:
        _check(name, item, Integral, "token ids, integers >= 0", low=0)
    return tuple(map(int, items))


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise UserError(f"logit_bias: expected a mapping from token ids to numbers, found {shown(given)}")
    for token, bias in given.items():
        _check("logit_bias", token, Integral, "token ids as keys, integers >= 0", low=0)
        expected = f"a finite number for token {int(token)}"
        _check("logit_bias", bias, Real, expected, low=-math.inf)
    most = int(sys.float_info.max)  # an integer may be larger
    numbers = {token: min(int(bias), most) if isinstance(bias, Integral) else bias for token, bias in given.items()}
    return {int(token): float(bias) for token, bias in numbers.items()}
