"""Radix selection against a sort."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glm4runtime.sampling.select import Selector

SELECTOR = Selector(300)  # one for all: nothing may be left of earlier calls


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([st.floats(0, width=32, max_value=1), st.floats(0, width=32, allow_infinity=False), st.just(0.5)])
    .flatmap(lambda elements: hnp.arrays(np.float32, st.integers(1, 300), elements=elements))
    .map(np.abs),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1.001, exclude_min=True),
    st.booleans(),
)
def test_selection_is_a_sort_and_a_sum(values: np.ndarray, seed: int, part: float, largest_first: bool) -> None:
    masses = np.random.default_rng(seed).integers(0, 9, values.size).astype(np.float32)  # whose sums are exact
    target = part * max(float(masses.sum()), 1.0)
    order = np.argsort(-values if largest_first else values, kind="stable")
    at = min(int(np.searchsorted(np.cumsum(masses[order]), target)), values.size - 1)
    last, before = SELECTOR.reaching(values, masses, target, largest_first=largest_first)
    assert last == values[order[at]]
    assert before == masses[values > last if largest_first else values < last].sum()
