"""What a step graph is given: masks that change by a band, the integers of a run, profiles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4runtime.backends.step import (
    INTEGERS,
    RunInputs,
    Staircase,
    fill_band,
    longest_run,
    most_sequences,
    profile_for,
    profiles_for,
)
from glm4runtime.contract import BundleError
from glm4runtime.contract.engine_spec import EngineSpec, Profile

RUNS = st.tuples(st.integers(0, 11), st.integers(1, 5)).map(lambda run: (run[0], min(run[1], 12 - run[0])))


@given(st.lists(RUNS, min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_a_mask_moved_from_run_to_run_is_that_of_the_run(runs: list[tuple[int, int]]) -> None:
    mask = np.zeros((5, 12), np.bool_)
    stairs = Staircase(5, 12, fill_band(mask))
    mask[...] = stairs.first()
    for start, count in runs:
        stairs.move(start, count)
        wanted = np.arange(12) <= start + np.arange(count)[:, None]
        assert np.array_equal(mask[:count], wanted)


def test_a_decode_step_changes_one_cell_and_a_chunk_its_own_width() -> None:
    fills: list[tuple[int, int, int, bool]] = []
    stairs = Staircase(4, 100, lambda *band: fills.append(band))
    for start, count in ((0, 4), (4, 4), (8, 4), (12, 1), (13, 1), (13, 1), (14, 4), (2, 1)):
        stairs.move(start, count)
    assert [(width, height, value) for _, width, height, value in fills] == [
        (4, 4, True), (4, 4, True),  # chunks
        (4, 1, True), (1, 1, True),  # decode steps; the first catches up, the third runs at the same place
        (1, 1, True), (6, 3, True),  # a draft: the row of the decode steps, and those that hung behind
        (12, 1, False),  # a rewind
    ]  # fmt: skip


def test_a_mask_cannot_have_more_rows_than_positions() -> None:
    with pytest.raises(ValueError, match="a mask of 5 rows for 4 positions"):
        Staircase(5, 4, lambda *band: None)


def test_integers_of_runs() -> None:
    arrays: dict[str, np.ndarray] = {}

    def allocate(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return arrays.setdefault(name, np.full(shape, -1, np.int64))

    inputs = RunInputs(4, 3, allocate)
    assert {name: array.shape for name, array in arrays.items()} == dict(
        zip(INTEGERS, ((1, 4), (1, 4), (1,), (1, 3)), strict=True)
    )
    inputs.fill([7, 8, 9], 20)
    assert [arrays[name].ravel().tolist() for name in INTEGERS] == [[7, 8, 9, -1], [20, 21, 22, -1], [20], [2, -1, -1]]
    inputs.fill([5, 6], 3, every_row=True)
    assert [arrays[name].ravel().tolist() for name in INTEGERS] == [[5, 6, 9, -1], [3, 4, 22, -1], [3], [0, 1, -1]]


TOKEN = Profile("token", (1, 1, 1), (1, 1, 1), (1, 1, 1))
MANY = Profile("many", (1, 1, 4), (1, 64, 512), (1, 1, 16))
SPEC = EngineSpec("tensorrt", "10", "8.9", "fp16", "standard", False, (MANY, TOKEN), "a", "b", 1, "c")


def test_the_profile_for_the_shortest_runs_is_taken() -> None:
    assert profiles_for(SPEC, 3, every_row=False) == [1, 0, 0]
    assert profiles_for(dataclasses.replace(SPEC, profiles=(MANY,)), 2, every_row=True) == [0, 0]
    assert longest_run(SPEC) == 512


@pytest.mark.parametrize(
    ("profiles", "widths", "every_row", "message"),
    [
        ((MANY,), 513, False, "a run of 513 tokens of one sequence with 1 rows"),
        ((MANY,), 17, True, "a run of 17 tokens of one sequence with 17 rows"),
        ((TOKEN,), 2, False, "a run of 2 tokens of one sequence with 1 rows"),
        ((dataclasses.replace(MANY, batch=(2, 2, 4)),), 1, False, "a run of 1 tokens of one sequence with 1 rows"),
    ],
)
def test_runs_that_no_profile_serves(profiles: tuple[Profile, ...], widths: int, every_row: bool, message: str) -> None:
    with pytest.raises(BundleError, match=f"tensorrt-sm89.engine: none of its profiles serves {message}"):
        profiles_for(dataclasses.replace(SPEC, profiles=profiles), widths, every_row=every_row)


def test_a_profile_made_for_batches_is_the_last_choice() -> None:
    steps = Profile("steps", (1, 8, 8), (1, 1, 1), (1, 1, 1))
    spec = dataclasses.replace(SPEC, profiles=(steps, MANY, TOKEN))
    assert [profile_for(spec, 1, 1, batch) for batch in (1, 2, 4, 5, 8)] == [2, 1, 1, 0, 0]
    assert most_sequences(spec) == 8 and most_sequences(dataclasses.replace(SPEC, profiles=(TOKEN,))) == 1
    with pytest.raises(BundleError, match="a run of 1 tokens of each of 9 sequences with 1 rows of logits"):
        profile_for(spec, 1, 1, 9)


def test_an_engine_for_batches_serves_no_sequence_alone() -> None:
    assert longest_run(dataclasses.replace(SPEC, profiles=(dataclasses.replace(MANY, batch=(2, 2, 4)),))) == 0
