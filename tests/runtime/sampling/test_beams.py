"""Beam search against transformers' own, both over the same small model."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4runtime.contract import UserError
from glm4runtime.sampling.beams import BeamSearch, Hypothesis
from glm4runtime.sampling.logprobs import log_softmax
from tests.helpers import checkpoints

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return checkpoints.random_model(vocab_size=40, num_hidden_layers=1, hidden_size=32, intermediate_size=32)


def search(model: Glm4ForCausalLM, beams: BeamSearch) -> tuple[Hypothesis, ...]:
    texts: list[list[int]] = [[]]
    while not beams.done:
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + text for text in texts])).logits[:, -1]
        parents, tokens = beams.step(log_softmax(logits.numpy()))
        texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
    return beams.hypotheses


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7, 2.0])
@pytest.mark.parametrize(("count", "eos"), [(2, [3]), (4, [1, 2, 3]), (3, list(range(10)))])
def test_the_answers_of_transformers(
    count: int, eos: list[int], length_penalty: float, early_stopping: Any, model: Glm4ForCausalLM
) -> None:
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        num_beams=count,
        num_return_sequences=count,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=eos,
        pad_token_id=39,
        max_new_tokens=9,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    beams = BeamSearch(count, eos, max_new_tokens=9, length_penalty=length_penalty, early_stopping=early_stopping)
    found = search(model, beams)
    assert len(found) == count
    for answer, sequence in zip(found, expected.sequences[:, len(PROMPT) :].tolist(), strict=True):
        assert list(answer.tokens) == sequence[: len(answer.tokens)]
        assert set(sequence[len(answer.tokens) :]) <= {39}
    np.testing.assert_allclose([answer.score for answer in found], expected.sequences_scores, rtol=1e-5)


def test_what_a_search_has_that_is_cut() -> None:
    """Texts under way and answers by one measure, the best first."""
    search, rng = BeamSearch(3, [7], max_new_tokens=9), np.random.default_rng(0)
    assert search.best() == ()
    rows = 1
    for length in (1, 2, 3):
        search.step(np.log(rng.dirichlet(np.ones(20), rows)).astype(np.float32))
        rows, texts = 3, search.best()
        scores = [text.score for text in texts]
        assert len(texts) == 3 and scores == sorted(scores, reverse=True)
        assert all(len(text.tokens) == length or text in search.hypotheses for text in texts)


def test_misuse() -> None:
    beams = BeamSearch(2, [1], max_new_tokens=1)
    rows = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    with pytest.raises(ValueError, match="log_probs: expected 1 rows, one a beam, found 2"):
        beams.step(np.concatenate([rows, rows]))
    with pytest.raises(UserError, match="2 beams and 1 stop tokens need a vocabulary of 4 tokens, found 3"):
        beams.step(rows[:, :3])
    assert beams.step(rows) == ([], []) and beams.done
    assert [answer.tokens for answer in beams.hypotheses] == [(0,), (1,)]
    with pytest.raises(RuntimeError, match="the beam search is done"):
        beams.step(rows)


@pytest.mark.parametrize(
    ("count", "stopping", "limit", "message"),
    [
        (1, False, 5, "beams: expected at least 2, found 1"),
        (2, "x", 5, "early_stopping: .* found 'x'"),
        (2, True, 0, "max_new"),
    ],
)
def test_values_that_make_no_sense(count: int, stopping: Literal["never"], limit: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BeamSearch(count, [], max_new_tokens=limit, early_stopping=stopping)
