"""Losses and scores beside transformers' own, on the embedded model in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4runtime import Session
from glm4runtime.contract import UserError
from glm4runtime.scoring import Score, log_probabilities
from tests.helpers.demo import DEMO

TEXT = "The capital of France is Paris. The capital of Italy is Rome, which lies on the Tiber."


@pytest.fixture(scope="module")
def reference() -> Glm4ForCausalLM:
    return Glm4ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def session(demo_sessions: dict[str, Session]) -> Session:
    return demo_sessions["fp32"]


def reference_log_probabilities(model: Glm4ForCausalLM, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].numpy()


@pytest.mark.parametrize("repeats", [1, 4])
def test_the_loss_is_transformers_own(session: Session, reference: Glm4ForCausalLM, repeats: int) -> None:
    ids = session.tokenizer.encode(TEXT) * repeats
    with torch.no_grad():
        expected = reference(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert session.loss(ids) == pytest.approx(expected, abs=1e-5)
    if repeats == 1:
        assert session.loss(TEXT) == session.loss(ids)


@pytest.mark.parametrize("first", [1, 2, 15, 16, 17, 18, 33, 34, "last"])
def test_every_token_s_log_probability_is_transformers_own(
    session: Session, reference: Glm4ForCausalLM, first: int | str
) -> None:
    ids = (session.tokenizer.encode(TEXT) * 3)[:50]
    start = len(ids) - 1 if isinstance(first, str) else first
    values, _ = log_probabilities(session.runner, ids, start)
    assert values.shape == (len(ids) - start,)
    assert np.abs(values - reference_log_probabilities(reference, ids)[start - 1 :]).max() < 2e-5


def test_scores_of_continuations(session: Session, reference: Glm4ForCausalLM) -> None:
    prompt, continuations = "The capital of France is", [" Paris", " Rome, as everybody knows", " a"]
    given = session.tokenizer.encode(prompt)
    for found, continuation in zip(session.score(prompt, continuations), continuations, strict=True):
        ids = session.tokenizer.encode(prompt + continuation)
        expected = reference_log_probabilities(reference, ids)[len(given) - 1 :]
        assert found.tokens == len(ids) - len(given)
        assert found.log_probability == pytest.approx(expected.sum(), abs=1e-4)
        assert found.mean == pytest.approx(expected.mean(), abs=1e-4)


def test_the_prompt_of_several_continuations_is_computed_once(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, runs = session.tokenizer.encode(TEXT), []
    session.runner.rewind()
    prefill = session.runner.prefill
    monkeypatch.setattr(session.runner, "prefill", lambda ids: (runs.append(len(ids)), prefill(ids))[1])
    session.score(given, [[5, 6], [7, 8], [9, 10]])
    assert runs[0] == len(given)
    assert max(runs[1:]) <= 3  # the last tokens, whose logits are wanted


def test_what_greedy_decoding_gives_is_greedy(session: Session) -> None:
    prompt = session.tokenizer.encode("The capital of France is")
    generation = session.generate(prompt)
    tokens = [next(generation) for _ in range(20)]
    found, other = session.score(prompt, [tokens, [*tokens[:-1], tokens[-1] ^ 1]])
    assert found.greedy and not other.greedy
    assert found.log_probability > other.log_probability


def test_a_word_s_end_that_makes_another_token_of_its_beginning(session: Session) -> None:
    whole = session.tokenizer.encode("The capital")
    prompt = next(
        text for cut in range(5, 11) if session.tokenizer.encode(text := "The capital"[:cut]) != whole[: len(text)]
    )
    (found,) = session.score(prompt, ["The capital"[len(prompt) :]])
    shared = sum(a == b for a, b in zip(session.tokenizer.encode(prompt), whole, strict=False))
    assert found.tokens == len(whole) - shared


def test_a_text_that_fills_the_cache_and_one_token_more(session: Session) -> None:
    room = session.runner.max_seq_len
    ids = (session.tokenizer.encode(TEXT) * (room // 10))[: room + 1]
    assert 0 < session.loss(ids) < 20
    with pytest.raises(UserError, match=f"needs {room + 1} tokens, the cache holds {room}"):
        session.loss([*ids, 5])


@pytest.mark.parametrize(
    ("prompt", "continuations", "message"),
    [
        ("", [" Paris"], "the prompt has no tokens"),
        ("The", [""], "the continuation '' has no tokens"),
        ([5], [[]], r"the continuation \[\] has no tokens"),
        ("The", [[5]], "must be all texts, or all token ids"),
        ([5], [[1 << 40]], "not a whole number in"),
        ("The", " Paris", "continuations is ' Paris', expected a list"),
        ([5], [6, 7], "a continuation is 6, expected a list"),
        (5, [[6]], "the prompt is 5, expected a list"),
        ("t", ["he"], "'t' is no token of its own in front of 'he': together they begin with another one; give a long"),
    ],
)
def test_what_cannot_be_scored(session: Session, prompt: object, continuations: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        session.score(prompt, continuations)  # type: ignore[arg-type]


def test_one_token_has_no_loss(session: Session) -> None:
    with pytest.raises(UserError, match="1 tokens of which the first 1 are given leave nothing to score"):
        session.loss([5])


def test_a_score_is_plain_data() -> None:
    assert Score(-6.0, 3, greedy=False).mean == -2.0
