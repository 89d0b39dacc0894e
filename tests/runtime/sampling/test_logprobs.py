"""Log-probabilities against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glm4runtime.contract import UserError
from glm4runtime.sampling.logprobs import TokenLogprobs, log_probabilities, log_softmax
from glm4runtime.sampling.rows import largest


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 1000, 151552])
@pytest.mark.parametrize("spread", [0.0, 0.5, 10.0])
def test_against_torch(vocab: int, spread: float) -> None:
    random = np.random.default_rng(vocab)
    logits = (random.normal(size=(3, vocab)) * spread).round(2).astype(np.float32)  # rounded: there are ties
    untouched, tokens = logits.copy(), random.integers(0, vocab, 3)
    expected = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-5, atol=1e-5)
    for row, wanted, token, found in zip(logits, expected, tokens, log_probabilities(logits, tokens, 20), strict=True):
        assert found.token == token and found.logprob == pytest.approx(wanted[token], rel=1e-5, abs=1e-5)
        order = np.lexsort((np.arange(vocab), -row))[:20]
        assert [i for i, _ in found.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in found.top], wanted[order], rtol=1e-5, atol=1e-5)
    assert np.array_equal(logits, untouched)


@pytest.mark.parametrize("count", [1, 3, 200, 1183, 1184, 2000])
def test_largest_is_a_sort(count: int) -> None:
    for size in (130, 3000, 151553):
        row = np.random.default_rng(count).integers(-500, 500, size).astype(np.float32)
        assert largest(row, count).tolist() == np.lexsort((np.arange(size), -row))[:count].tolist()


def test_extremes() -> None:
    big = float(np.finfo(np.float32).max)
    with np.errstate(all="raise"):
        found = log_probabilities(np.array([[big, -big, -math.inf]], np.float32), [2], 3)
    assert found == [TokenLogprobs(2, -math.inf, ((0, 0.0), (1, -2 * big), (2, -math.inf)))]
    assert log_probabilities(np.zeros((0, 4), np.float32), [], 2) == []
    assert log_probabilities(np.zeros((1, 4), np.float32), [1], 0)[0].top == ()
    with pytest.raises(UserError, match="logits: expected a finite maximum, found nan at token 1"):
        log_probabilities(np.array([[0, math.nan]], np.float32), [0], 1)
    with pytest.raises(UserError, match=r"tokens: expected token ids in 0\.\.3, found 4"):
        log_probabilities(np.zeros((1, 4), np.float32), [4], 1)
    with pytest.raises(ValueError, match=r"logits: expected \[2, vocab\], a row for each token, found \[1, 4\]"):
        log_probabilities(np.zeros((1, 4), np.float32), [1, 2], 1)
