"""Choosing among a row's most probable tokens: the whole row's token, or none at all. No graph is run."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from glm4runtime import SamplingParams, UserError
from glm4runtime.backends.held_row import HeldRow
from glm4runtime.sampling import Sampler

VOCAB = 1000


def held(row: NDArray[np.float32], count: int, *, off: float = 0.0, reverse: bool = False) -> HeldRow:
    """A device's words on a row: its sum off by a share, equal logits in whichever order."""
    ids = np.lexsort((-np.arange(len(row)) if reverse else np.arange(len(row)), -row))[:count]
    with np.errstate(all="ignore"):
        total = np.log(np.exp(row.astype(np.float64)).sum() * (1 + off))
    return HeldRow(row[ids], ids, float(total), lambda: row)


def rows(spread: float, seed: int) -> NDArray[np.float32]:
    """Logits of which some are equal."""
    values = np.random.default_rng(seed).normal(0, spread, (40, VOCAB)).astype(np.float16)
    return values.astype(np.float32)


SAMPLINGS = (
    {},
    {"temperature": 0.01, "top_p": 0.9},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.3, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    {"temperature": 1.8, "top_p": 0.2, "min_p": 0.02},
    {"temperature": 1e30, "top_p": 0.01},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_k": 12, "typical_p": 0.7},
    {"temperature": 0.8, "min_p": 0.05, "typical_p": 0.8},
)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_the_token_of_the_whole_row(sampling: dict[str, float], spread: float) -> None:
    params = SamplingParams(seed=3, **sampling)  # type: ignore[arg-type]
    whole, among = (Sampler(params, VOCAB, stop=(4,)) for _ in range(2))
    for index, row in enumerate(rows(spread, seed=index_of(sampling))):
        for off in (-1e-5, 1e-5):
            given = held(row, 24, off=off, reverse=bool(index % 2))
            assert among(given) == whole(row)
            assert among.state() == whole.state()  # the random stream too


def index_of(sampling: dict[str, float]) -> int:
    return SAMPLINGS.index(sampling)  # type: ignore[arg-type]


def fetched(sampling: dict[str, float], row: NDArray[np.float32], count: int = 8) -> bool:
    """Whether the row is asked for."""
    asked = []
    given = held(row, count)
    Sampler(SamplingParams(seed=1, **sampling), len(row))(  # type: ignore[arg-type]
        HeldRow(given.values, given.ids, given.log_sum, lambda: asked.append(True) or row)  # type: ignore[func-returns-value]
    )
    return bool(asked)


def test_when_the_row_is_fetched() -> None:
    peaked = np.linspace(0, -40, 100, dtype=np.float32)
    for sampling in ({}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.0, "top_k": 5}):
        assert not fetched(sampling, peaked)
    assert fetched({"temperature": 1.0, "top_p": 0.999}, peaked)  # the nucleus may go on below the least that is named
    assert fetched({"temperature": 1.0, "min_p": 0.01}, peaked)
    flat = np.zeros(100, np.float32)
    for sampling in ({}, {"temperature": 1.0, "top_p": 0.01}, {"temperature": 1.0, "top_k": 5}):
        assert fetched(sampling, flat)  # the lowest of equal ids win, and the named ones needn't be those
    assert fetched({"temperature": 1.0, "top_k": 5, "banned_tokens": [3]}, peaked)
    assert fetched({"forced_tokens": [3]}, peaked)


def test_a_share_at_the_border_is_not_guessed() -> None:
    """Two tokens of half the weight each: whether one is enough is for the row's own sum to say."""
    row = np.full(64, -60, np.float32)
    row[[7, 50]] = np.log(0.5), np.log(0.5) - 1e-5
    assert fetched({"temperature": 1.0, "top_p": 0.5}, row)
    assert not fetched({"temperature": 1.0, "top_p": 0.4}, row)


def test_a_row_without_a_distribution_is_refused_as_ever() -> None:
    for bad in (np.nan, np.inf):
        row = np.zeros(50, np.float32)
        row[3] = bad
        with pytest.raises(UserError, match="expected a finite maximum"):
            Sampler(SamplingParams(), 50)(held(row, 8))


def test_a_grammar_needs_the_row() -> None:
    row = np.linspace(0, -40, 64, dtype=np.float32)
    allowed = np.array([0xFFFFFFFE, 0xFFFFFFFF], np.uint32)
    assert Sampler(SamplingParams(), 64)(held(row, 8), allowed) == 1
