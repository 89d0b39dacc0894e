"""What a session does with the parameters: transformers' texts, drafts, interrupts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4runtime import SamplingParams, Session, UserError, load
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.interrupts import Interrupt

PROMPT = [5, 6, 7, 8, 5, 6, 7]
EVERYTHING: dict[str, Any] = {
    "min_new_tokens": 12,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.05,
    "dry_multiplier": 0.3,
    "dry_allowed_length": 3,
    "no_repeat_ngram_size": 9,
    "logit_bias": {4: 0.5},
    "banned_tokens": [9],
    "forced_tokens": [8, 5, 6],
}
SAMPLED: dict[str, Any] = {"temperature": 0.4, "seed": 3, "min_p": 0.02, "typical_p": 0.98, "xtc_probability": 0.2}


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return checkpoints.random_model(eos_token_id=[1], vocab_size=13)


@pytest.fixture(scope="module")
def session(model: Glm4ForCausalLM, build_bundle: Build) -> Session:
    return load(build_bundle(model, precision="fp32", target="cpu"), invariant=True)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "repetition_penalty": 1.05},
    ],
)
def test_greedy_texts_are_transformers(params: dict[str, Any], model: Glm4ForCausalLM, session: Session) -> None:
    for prompt in (PROMPT, [3, 4], [12, 11, 10, 12]):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **params}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        generation = session.generate(prompt, SamplingParams(max_new_tokens=30, **params))
        found = list(generation)
        assert found + ([1] if generation.stop_token == 1 else []) == expected


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_change_no_token(sampled: dict[str, Any], session: Session) -> None:
    params = SamplingParams(max_new_tokens=50, **{**EVERYTHING, **sampled})
    plain = list(session.generate(PROMPT, params))
    generation = session.generate(PROMPT, params, lookup=7)
    assert list(generation) == plain and plain[:3] == [8, 5, 6] and 9 not in plain and len(plain) >= 12
    assert generation.lookup.accepted > 0


@pytest.mark.parametrize("lookup", [0, 7])
def test_an_interrupted_read_changes_nothing(lookup: int, session: Session) -> None:
    params = SamplingParams(max_new_tokens=14, **{**EVERYTHING, **SAMPLED})
    wanted = list(session.generate(PROMPT, params, lookup=lookup))
    with Interrupt(0) as count:
        list(session.generate(PROMPT, params, lookup=lookup))
    for at in range(1, count.lines // 2, max(1, count.lines // 120)):
        generation, tokens = session.generate(PROMPT, params, lookup=lookup), []
        with Interrupt(at) as interrupt:
            while generation.finish_reason is None:
                try:
                    tokens.extend([token] if (token := next(generation, None)) is not None else [])
                except KeyboardInterrupt:
                    continue
        assert interrupt.lines >= at and tokens == wanted


def test_a_refused_request_leaves_the_one_under_way_alone(session: Session) -> None:
    params = SamplingParams(max_new_tokens=8)
    wanted = list(session.generate(PROMPT, params))
    generation = session.generate(PROMPT, params)
    tokens = [next(generation)]
    with pytest.raises(UserError, match=r"banned_tokens: expected token ids in 0\.\.12, found 13"):
        session.generate(PROMPT, SamplingParams(banned_tokens=[13]))
    assert [*tokens, *generation] == wanted
