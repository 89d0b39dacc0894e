"""Sampling parameters: what they take, refuse and keep."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from glm4runtime.contract import UserError
from glm4runtime.sampling import SamplingParams


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("min_new_tokens", 257, "an integer from 0 to max_new_tokens=256, found 257"),
        ("min_p", 1.1, r"a number from 0 to 1 \(0 turns it off\), found 1.1"),
        ("typical_p", 0.0, r"a number above 0 and at most 1 \(1 turns it off\), found 0.0"),
        ("xtc_probability", -0.1, "a number from 0 to 1 .*, found -0.1"),
        ("xtc_threshold", math.nan, "a number from 0 to 1, found nan"),
        ("repetition_penalty", 0, r"a finite number above 0 \(1 turns it off\), found 0"),
        ("repetition_penalty", math.inf, "a finite number above 0 .*, found inf"),
        ("presence_penalty", 2.5, r"a number from -2 to 2 \(0 turns it off\), found 2.5"),
        ("frequency_penalty", "1", "a number from -2 to 2 .*, found '1'"),
        ("no_repeat_ngram_size", -1, "an integer >= 0 .*, found -1"),
        ("dry_multiplier", -1.0, "a finite number >= 0 .*, found -1.0"),
        ("dry_base", 0.5, "a finite number >= 1, found 0.5"),
        ("dry_allowed_length", 0, "an integer >= 1, found 0"),
        ("dry_sequence_breakers", 5, "token ids, found 5"),
        ("banned_tokens", "56", "token ids, found '56'"),
        ("banned_tokens", [5, -1], "token ids, integers >= 0, found -1"),
        ("forced_tokens", [True], "token ids, integers >= 0, found True"),
        ("logit_bias", [(1, 2.0)], "a mapping from token ids to numbers, found .*"),
        ("logit_bias", {"5": 1.0}, "token ids as keys, integers >= 0, found '5'"),
        ("logit_bias", {5: -math.inf}, "a finite number for token 5, found -inf"),
    ],
)
def test_what_is_refused(name: str, wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: expected {message}$"):
        SamplingParams(**{name: wrong})


def test_more_forced_tokens_than_there_may_be() -> None:
    with pytest.raises(UserError, match="forced_tokens: 3 tokens are more than max_new_tokens=2"):
        SamplingParams(forced_tokens=[1, 2, 3], max_new_tokens=2)


def test_a_copy_is_kept() -> None:
    bias, banned = {np.int64(5): np.float32(1.5)}, [1, 2]
    params = SamplingParams(logit_bias=bias, banned_tokens=banned, dry_sequence_breakers=np.array([3, 4]))
    bias.clear()
    banned.clear()
    assert (params.logit_bias, params.banned_tokens, params.dry_sequence_breakers) == ({5: 1.5}, (1, 2), (3, 4))
    assert pickle.loads(pickle.dumps(params)) == params == dataclasses.replace(params)
    assert hash(params) == hash(dataclasses.replace(params)) and params != SamplingParams()
