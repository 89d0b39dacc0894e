"""Min-p, typical and XTC, and all filters in a row, against transformers and the published algorithm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from glm4runtime.sampling import Sampler, SamplingParams, Scratch
from glm4runtime.sampling.filters import Filters

Logits = NDArray[np.float32]
WARPERS: list[tuple[str, Any, Any]] = [  # in transformers' order; a threshold close by tells where rounding decides
    ("temperature", TemperatureLogitsWarper, 1.0),
    ("top_k", TopKLogitsWarper, 0),
    ("top_p", TopPLogitsWarper, 1.0),
    ("min_p", MinPLogitsWarper, 0.0),
    ("typical_p", TypicalLogitsWarper, 1.0),
]
rows = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 200), st.floats(0.1, 4)).map(
    lambda given: np.random.default_rng(given[0]).normal(0, given[2], given[1]).astype(np.float32)
)


def warped(logits: NDArray[np.floating], params: dict[str, float]) -> NDArray[np.float64]:
    """What transformers draws from: float64 [vocab]."""
    chain = [warper(params[name]) for name, warper, off in WARPERS if params.get(name, off) != off]
    scores = LogitsProcessorList(chain)(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits)[None])
    return torch.softmax(scores[0].double(), dim=-1).numpy()


def kept(logits: Logits, random: float = 0.0, stop: tuple[int, ...] = (), **params: Any) -> NDArray[np.float64]:
    """What we draw from: float64 [vocab]."""
    params.setdefault("temperature", 1.0)
    ids, weights = Filters(SamplingParams(**params), Scratch(logits.size), stop).kept(
        logits, logits.max(), lambda: random
    )
    found = np.zeros(logits.size)
    found[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return found


@settings(deadline=None, max_examples=100)
@given(
    rows,
    st.sampled_from([1.0, 0.6, 2.5]),
    st.sampled_from([0, 3, 50]),
    st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    st.one_of(st.just(0.0), st.floats(0.001, 1)),
    st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
)
def test_filters_together_are_transformers(
    logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    expected = warped(logits, params)
    for name in ("top_p", "min_p", "typical_p"):  # where rounding decides, both answers are right
        if 0 < params[name] < 1:
            for nudge in (0.99999, 1.00001):
                assume(np.array_equal(expected > 0, warped(logits, {**params, name: params[name] * nudge}) > 0))
    np.testing.assert_allclose(kept(logits, **params), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("mass", [0.05, 0.9, 0.9999])
def test_typical_at_full_vocabulary(spread: float, mass: float) -> None:
    """Each way to look: near to typical surprise, far from it, and all tokens alike."""
    logits = (np.random.default_rng(1).standard_normal(151552) * spread).astype(np.float32)
    found, expected = kept(logits, typical_p=mass) > 0, warped(logits.astype(np.float64), {"typical_p": mass}) > 0
    assert np.count_nonzero(found) == pytest.approx(np.count_nonzero(expected), rel=2e-3)
    assert np.count_nonzero(found != expected) <= 2e-3 * np.count_nonzero(expected)


@pytest.mark.parametrize("step", [0.0, 0.01, 0.25])
@pytest.mark.parametrize("mass", [0.05, 0.9, 0.9999])
def test_nucleus_at_full_vocabulary(step: float, mass: float) -> None:
    """Rows without a peak, with few ties and with many: as many tokens as a sum over a sort says, lowest ids first."""
    logits = np.random.default_rng(1).standard_normal(151552)
    logits = (np.round(logits / step) * step if step else logits).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(np.exp(logits.astype(np.float64) - logits.max())[order])
    count = int(np.searchsorted(sums, mass * sums[-1])) + 1
    found = kept(logits, top_p=mass) > 0
    assert np.count_nonzero(found) == pytest.approx(count, abs=1)  # exp in float32 may round it to a neighbour
    assert np.array_equal(np.flatnonzero(found), np.sort(order[: np.count_nonzero(found)]))


def xtc(probabilities: NDArray[np.float64], threshold: float, special: tuple[int, ...]) -> NDArray[np.float64]:
    """text-generation-webui's XTCLogitsWarper by definition, where it acts."""
    order = np.argsort(-probabilities, kind="stable")
    top = [int(token) for token in order if probabilities[token] >= threshold]
    if set(top[:-1]) & set(special):
        return probabilities
    left = probabilities.copy()
    left[top[:-1]] = 0
    return left / left.sum()


def test_nucleus_of_nearly_everything() -> None:
    """The sum may stay below its target by rounding, and the last weight be 0."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal(2000) * rng.choice([1, 60])).astype(np.float32)
        params = SamplingParams(temperature=1.0, top_p=0.9999999999999999)
        ids, weights = Filters(params, Scratch(2000), ()).kept(logits, logits.max(), lambda: 0.5)
        lost = np.setdiff1d(np.arange(2000), ids if ids is not None else np.flatnonzero(weights))
        assert np.exp(logits[lost] - logits.max()).sum(dtype=np.float64) < 1e-9


@settings(deadline=None, max_examples=100)
@given(rows, st.floats(0.001, 0.6), st.sampled_from([0, 5]), st.sampled_from([(), (1,)]))
def test_xtc_by_its_definition(logits: Logits, threshold: float, top_k: int, stop: tuple[int, ...]) -> None:
    params = {"temperature": 1.5, "top_k": top_k}
    before = warped(logits, params)
    assume(np.abs(before / threshold - 1).min() > 1e-5 and np.unique(logits).size == logits.size)
    found = kept(logits, 0.29, stop, **params, xtc_probability=0.3, xtc_threshold=threshold)
    np.testing.assert_allclose(found, xtc(before, threshold, stop), rtol=1e-4, atol=1e-12)
    assert np.array_equal(kept(logits, 0.3, stop, **params, xtc_probability=0.3), kept(logits, **params))


@pytest.mark.parametrize("cut", [{"top_p": 0.55}, {"top_k": 2}, {"temperature": 0.001}])
def test_xtc_leaves_a_token_that_earlier_cuts_left(cut: dict[str, float]) -> None:
    logits = np.log(np.array([0.3, 0.29, 0.21, 0.2], np.float32))
    assert kept(logits, **cut, xtc_probability=1.0, xtc_threshold=0.0).tolist() == [0, 1, 0, 0]


def test_xtc_acts_as_often_as_asked() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1, xtc_probability=0.25, xtc_threshold=0.15), 3)
    counts = np.bincount([sampler(logits) for _ in range(8000)], minlength=3) / 8000
    np.testing.assert_allclose(counts, 0.75 * np.array([0.5, 0.3, 0.2]) + 0.25 * np.array([0, 0, 1]), atol=0.02)


def test_equal_tokens() -> None:
    logits = np.zeros(6, np.float32)
    assert np.flatnonzero(kept(logits, xtc_probability=1.0, xtc_threshold=0.1)).tolist() == [0]
    assert np.flatnonzero(kept(logits, min_p=1.0)).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.flatnonzero(kept(logits, typical_p=0.01)).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.flatnonzero(kept(np.zeros(1, np.float32), xtc_probability=1.0, typical_p=0.5, min_p=0.5)).tolist() == [0]
