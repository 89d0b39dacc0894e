"""Biases, penalties, bans and masks against transformers' processors, and against published formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from glm4runtime.contract import UserError
from glm4runtime.sampling import Sampler, SamplingParams, Scratch
from glm4runtime.sampling.chain import Chain
from glm4runtime.sampling.history import History

VOCAB = 12
Logits = NDArray[np.float32]
ids = st.integers(0, VOCAB - 1)
texts = st.lists(st.integers(0, 4), max_size=30)  # few different tokens: n-grams come again
rows = st.integers(0, 2**32 - 1).map(lambda seed: (np.random.default_rng(seed).normal(0, 4, VOCAB)).astype(np.float32))


def history_of(prompt: list[int], answer: list[int]) -> History:
    history = History(np.array(prompt, np.int64))
    for token in answer:
        history.append(token)
    return history


def processed(
    logits: Logits, prompt: list[int], answer: list[int], stop: tuple[int, ...] = (), **params: Any
) -> Logits:
    before = logits.copy()
    scores = Chain(SamplingParams(**params), Scratch(len(logits)), stop)(
        logits, history_of(prompt, answer), None
    ).copy()
    assert np.array_equal(logits, before)
    return scores


def theirs(logits: Logits, text: list[int], processors: list[Any]) -> Logits:
    tokens = torch.tensor([text], dtype=torch.long)
    return LogitsProcessorList(processors)(tokens, torch.from_numpy(logits.copy())[None])[0].numpy()


def dry_of(
    text: list[int], multiplier: float, base: float, allowed: int, breakers: tuple[int, ...]
) -> dict[int, float]:
    """text-generation-webui's DRYLogitsProcessor by definition: what is subtracted from each token's logit."""
    longest: dict[int, int] = {}
    for place in range(len(text) - 1):
        length = 0
        while length <= place and text[place - length] == text[-1 - length] and text[-1 - length] not in breakers:
            length += 1
        following = text[place + 1]
        if length >= allowed and following not in breakers:
            longest[following] = max(length, longest.get(following, 0))
    return {token: multiplier * base ** (length - allowed) for token, length in longest.items()}


@settings(deadline=None, max_examples=100)
@given(
    rows,
    texts,
    texts,
    st.sampled_from([1.0, 0.7, 1.3]),
    st.integers(0, 4),
    st.integers(0, 8),
    st.dictionaries(ids, st.floats(-20, 20, width=32), max_size=4),
    st.lists(ids, max_size=4),
    st.sampled_from([(), (1,), (1, 7)]),
)
def test_processors_together_are_transformers(
    logits: Logits,
    prompt: list[int],
    answer: list[int],
    penalty: float,
    ngram: int,
    shortest: int,
    bias: dict[int, float],
    banned: list[int],
    stop: tuple[int, ...],
) -> None:
    """In the order of ``_get_logits_processor``, on random texts."""
    found = processed(
        logits,
        prompt,
        answer,
        stop,
        repetition_penalty=penalty,
        no_repeat_ngram_size=ngram,
        min_new_tokens=shortest,
        logit_bias=bias,
        banned_tokens=banned,
    )
    chain: list[Any] = []
    if bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty))
    if ngram:
        chain.append(NoRepeatNGramLogitsProcessor(ngram))
    if stop:
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), shortest, list(stop)))
    if banned:
        chain.append(SuppressTokensLogitsProcessor(banned))
    np.testing.assert_allclose(found, theirs(logits, prompt + answer, chain), rtol=2e-6)


@settings(deadline=None)
@given(rows, texts, texts, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_by_openais_formula(
    logits: Logits, prompt: list[int], answer: list[int], presence: float, frequency: float
) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, of what was sampled alone."""
    found = processed(logits, prompt, answer, presence_penalty=presence, frequency_penalty=frequency)
    counts = np.bincount(answer, minlength=VOCAB)
    np.testing.assert_allclose(found, logits - counts * frequency - (counts > 0) * presence, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    rows,
    texts,
    texts,
    st.floats(0.1, 3),
    st.floats(1, 3),
    st.integers(1, 4),
    st.sampled_from([(), (0,), (0, 3)]),
)
def test_dry_by_its_definition(
    logits: Logits,
    prompt: list[int],
    answer: list[int],
    multiplier: float,
    base: float,
    allowed: int,
    breakers: tuple[int, ...],
) -> None:
    """At every step of a growing text, with what the steps before left behind."""
    params = SamplingParams(
        dry_multiplier=multiplier, dry_base=base, dry_allowed_length=allowed, dry_sequence_breakers=breakers
    )
    chain, history = Chain(params, Scratch(VOCAB), ()), history_of(prompt, [])
    for at in range(len(answer) + 1):
        expected = logits.astype(np.float64)
        for token, penalty in dry_of(prompt + answer[:at], multiplier, base, allowed, breakers).items():
            expected[token] -= penalty
        np.testing.assert_allclose(chain(logits, history, None), expected, rtol=1e-5, atol=1e-5)
        history.append(answer[at] if at < len(answer) else 0)


def test_penalties_never_make_a_logit_infinite() -> None:
    big = float(np.finfo(np.float32).max)
    logits = np.array([big, -big, 0.0, -math.inf], np.float32)
    text = [0, 1, 2, 3] * 60
    for params in (
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 5e-324},
        {"logit_bias": {0: 1e300, 1: -1e300, 3: 1e300}},
        {"repetition_penalty": 10**400},
        {"logit_bias": {0: 10**400}},
        {"dry_multiplier": 10**400, "dry_base": 10**400},
        {"dry_multiplier": 1e300, "dry_base": 1e300},
        {"dry_multiplier": 1.0, "dry_base": 2.0},
        {"frequency_penalty": 2.0, "presence_penalty": -2.0},
    ):
        with np.errstate(all="raise"):
            found = processed(logits, text, text, **params)
        assert np.isfinite(found).tolist() == [True, True, True, False], params


RICH: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.4,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": (3,),
    "no_repeat_ngram_size": 6,
    "min_new_tokens": 10,
    "xtc_probability": 0.5,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_going_back_gives_the_same_tokens(temperature: float) -> None:
    """Whatever was chosen or recorded in between, and however far back: to the prompt itself at the first step."""
    params = SamplingParams(temperature=temperature, seed=4, **RICH)
    logits = np.random.default_rng(0).normal(0, 1, (60, VOCAB)).astype(np.float32)
    plain = Sampler(params, VOCAB, prompt=[5, 6, 7], stop=[1])
    wanted = [plain(row) for row in logits]
    sampler, tokens = Sampler(params, VOCAB, prompt=[5, 6, 7], stop=[1]), []
    for at, row in enumerate(logits):
        state = sampler.state()
        for wrong in logits[at : at + at % 4]:
            sampler(wrong[::-1].copy())
        sampler.record(2)
        sampler.restore(state)
        tokens.append(sampler(row))
    assert tokens == wanted
    fresh = Sampler(params, VOCAB, prompt=[5, 6, 7], stop=[1])
    for token in wanted[:40]:
        fresh.record(token)
    if not temperature:
        assert [fresh(row) for row in logits[40:]] == wanted[40:]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_mask_by_its_bits(vocab: int) -> None:
    random = np.random.default_rng(vocab)
    sampler = Sampler(SamplingParams(), vocab)
    for _ in range(40):
        logits = random.normal(size=vocab).astype(np.float32)
        allowed = random.integers(0, 2**32, -(-vocab // 32), np.uint32)
        bits = [i for i in range(vocab) if int(allowed[i // 32]) >> i % 32 & 1]
        if bits:
            assert sampler(logits, allowed) == max(bits, key=lambda i: logits[i])
        else:
            with pytest.raises(UserError, match="every token is forbidden here"):
                sampler(logits, allowed)
    with pytest.raises(ValueError, match=r"allowed: expected uint32 \[\d\], .* found uint8"):
        sampler(logits, allowed.view(np.uint8))


def test_forced_tokens_come_first_and_count() -> None:
    logits = np.array([0, 1, 2, 3], np.float32)
    sampler = Sampler(SamplingParams(forced_tokens=[1, 0], presence_penalty=2.0, banned_tokens=[3]), 4)
    assert [sampler(logits) for _ in range(4)] == [1, 0, 2, 2]
    masked = Sampler(SamplingParams(forced_tokens=[1]), 4)
    with pytest.raises(UserError, match="forced_tokens: token 1 is forbidden here by the mask"):
        masked(logits, np.array([0b1101], np.uint32))
    assert masked(logits, np.array([0b0010], np.uint32)) == 1


def test_nothing_left() -> None:
    with pytest.raises(UserError, match="sampling: every token is forbidden here, by banned_tokens"):
        Sampler(SamplingParams(banned_tokens=range(4)), 4)(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"banned_tokens": [4]}, r"banned_tokens: expected token ids in 0\.\.3, found 4"),
        (
            {"forced_tokens": [2**80]},
            r"forced_tokens: expected token ids in 0\.\.3, found an integer of 81 bits|found 12",
        ),
        ({"logit_bias": {9: 1.0}}, r"logit_bias: expected token ids in 0\.\.3, found 9"),
        ({"dry_multiplier": 1.0, "dry_sequence_breakers": [7]}, r"dry_sequence_breakers: expected .*, found 7"),
    ],
)
def test_ids_outside_the_vocabulary(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(SamplingParams(**params), 4)
