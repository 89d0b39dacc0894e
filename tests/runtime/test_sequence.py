"""What a generation takes over from the one before: rows of the cache that its prompt begins with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm4export.sources.checkpoint import locate
from glm4runtime import Generation, SamplingParams, Session, UserError, load
from glm4runtime.backends.invariance import find_granule
from glm4runtime.backends.runner import Runner
from glm4runtime.backends.sequence import TokenSequence

from ..conftest import Build

DEMO = locate(None).folder
PROMPTS = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))
BUNDLES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4, prefill in int8": {"precision": "int4", "prefill_precision": "int8"},
    "int4, int8 cache": {"precision": "int4", "kv_cache": "int8", "calibrate": DEMO / "heldout.txt"},
    "a step graph": {"precision": "int4", "target": "tensorrt", "max_seq_len": 96},
}
SIZES: dict[str, Any] = {"provider": "cpu", "max_seq_len": 88, "prefill_chunk": 16}
TOLERANCE = 2e-5  # of fp32 logits

Turn = tuple[int, list[int], int, int, int]  # tokens of the history kept, new ones, decoded, guesses, interrupted run
_TOKEN = st.integers(5, 40)
TURNS = st.lists(
    st.tuples(
        st.one_of(st.just(999), st.integers(0, 80)),
        st.lists(_TOKEN, min_size=1, max_size=24),
        st.integers(0, 30),
        st.sampled_from([0, 0, 3]),
        st.one_of(st.just(0), st.integers(1, 4)),
    ),
    min_size=2,
    max_size=5,
)
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=BUNDLES)
def invariant(request: pytest.FixtureRequest, build_bundle: Build) -> tuple[Runner, Runner]:
    """Two invariant runners of the embedded model: one for conversations, one that begins anew each time."""
    bundle = build_bundle(None, **{"target": "cpu", **BUNDLES[request.param]})
    if find_granule(load(bundle, **SIZES).runner) is None:
        pytest.skip("this machine's kernels have no granule")
    return load(bundle, invariant=True, **SIZES).runner, load(bundle, invariant=True, **SIZES).runner


@pytest.fixture(scope="module")
def plain(demo_bundles: dict[str, Path]) -> tuple[Runner, Runner]:
    return load(demo_bundles["fp32"], **SIZES).runner, load(demo_bundles["fp32"], **SIZES).runner


def anew(runner: Runner, ids: list[int]) -> tuple[np.ndarray, list[bytes]]:
    """Logits and cache of a prompt computed whole."""
    runner.rewind()
    return runner.prefill(ids).copy(), runner.cache_bits(len(ids))


@contextmanager
def runs_of(runner: Runner, *, interrupt: int = 0) -> Iterator[list[tuple[int, int]]]:
    """The prompt runs of a block, as first row and width; ``interrupt``: Ctrl-C comes as the so manieth has run."""
    runs: list[tuple[int, int]] = []
    right = runner._run_prompt

    def record(ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        runs.append((start, len(ids)))
        row = right(ids, start, padding)
        if len(runs) == interrupt:
            raise KeyboardInterrupt
        return row

    runner._run_prompt = record  # type: ignore[method-assign]
    try:
        yield runs
    finally:
        runner._run_prompt = right  # type: ignore[method-assign]


def converse(runner: Runner, turns: list[Turn]) -> Iterator[tuple[list[int], Generation]]:
    """Turn after turn: each prompt keeps some of the text so far and goes on with new tokens."""
    history: list[int] = []
    for kept, new, count, lookup, interrupt in turns:
        prompt = [*history[: min(kept, runner.max_seq_len - len(new))], *new]
        params = SamplingParams(max_new_tokens=count + 1)
        if interrupt:
            try:
                with runs_of(runner, interrupt=interrupt):
                    Generation(runner, prompt, params, stop=(), lookup=lookup)
            except KeyboardInterrupt:
                held = runner.sequence.tokens.tolist()
                assert held == prompt[: len(held)] and len(held) < len(prompt)
        generation = Generation(runner, prompt, params, stop=(), lookup=lookup)
        yield prompt, generation
        history = [*prompt, *generation]
        assert runner.sequence.tokens.tolist() == history[: runner.length]


@EXAMPLES
@given(turns=TURNS)
def test_an_invariant_turn_has_the_bits_of_one_computed_whole(
    turns: list[Turn], invariant: tuple[Runner, Runner]
) -> None:
    runner, other = invariant
    for prompt, generation in converse(runner, turns):
        logits, cache = anew(other, prompt)
        assert generation._logits.tobytes() == logits.tobytes()
        assert runner.cache_bits(len(prompt)) == cache


@EXAMPLES
@given(turns=TURNS)
def test_a_turn_is_one_computed_whole_within_rounding(turns: list[Turn], plain: tuple[Runner, Runner]) -> None:
    runner, other = plain
    for prompt, generation in converse(runner, turns):
        assert np.abs(generation._logits - anew(other, prompt)[0]).max() <= TOLERANCE


def test_a_turn_computes_what_is_new(plain: tuple[Runner, Runner], demo_bundles: dict[str, Path]) -> None:
    runner, first, new = plain[0], list(range(5, 25)), [7, 8, 9, 10, 11]
    runner.rewind()
    answer = list(Generation(runner, first, SamplingParams(max_new_tokens=10), stop=()))
    assert runner.length == 29  # the last one chosen isn't in the cache
    with runs_of(runner) as runs:
        generation = Generation(runner, [*first, *answer, *new], SamplingParams())
    assert (generation.prompt_tokens, generation.reused_tokens, runs) == (35, 28, [(28, 7)])
    for prompt, wanted in ((first, (18, 2)), (first[:19], (16, 3)), ([5], (0, 1)), ([5, 6], (0, 2)), ([9, 8], (0, 2))):
        with runs_of(runner) as runs:  # never a run of one row where the whole prompt has more: those have other bits
            assert Generation(runner, prompt, SamplingParams()).reused_tokens == wanted[0]
        assert runs == [wanted]


def test_an_invariant_turn_keeps_no_row_that_a_decode_step_wrote(invariant: tuple[Runner, Runner]) -> None:
    runner, first, new = invariant[0], list(range(5, 25)), [7, 8, 9, 10, 11]
    runner.rewind()
    answer = list(Generation(runner, first, SamplingParams(max_new_tokens=10), stop=()))
    with runs_of(runner) as runs:
        generation = Generation(runner, [*first, *answer, *new], SamplingParams())
    chunks = runner.manifest.cache.dtype == "int8"  # there they have fixed places, the last one as a width asks for
    assert generation.reused_tokens == (16 if chunks else 20 - 20 % runner.granule)
    assert 0 <= generation.reused_tokens - runs[0][0] < runner.granule
    assert sum(width for _, width in runs) < 15 + len(runs) * runner.granule + (4 if chunks else 0)
    assert runner.sequence.exact == (runs[-1][0] if chunks and runs[-1][0] % 16 else 35)


def test_a_conversation(demo_sessions: dict[str, Session]) -> None:
    """Every turn but the first reuses all of the prompt before, and answers as a session of its own does."""
    session, params = demo_sessions["fp32"], SamplingParams(max_new_tokens=40)
    messages: list[dict[str, Any]] = []
    before = 0
    for prompt in PROMPTS[:3]:
        messages.append(prompt["messages"][-1])
        stream = session.chat(messages, params)
        assert stream.generation.reused_tokens >= before
        text = stream.read()
        before = (stream.generation.prompt_tokens - 1) // 2 * 2
        held = session.runner.sequence.tokens.tolist()
        session.runner.rewind()
        assert session.chat(messages, params).read() == text
        session.runner.rewind()
        session.runner.prefill(held)
        messages.append({"role": "assistant", "content": text})
    assert before > 0


def test_sequences_stand_alone() -> None:
    sequence = TokenSequence(8)
    sequence.record([5, 6, 7], 0)
    sequence.extend(0, 3, exact=True)
    sequence.record((8, 9), 3)
    sequence.overwrite(3)
    sequence.ahead = 2
    assert (sequence.length, sequence.exact, sequence.tokens.tolist()) == (3, 3, [5, 6, 7])
    state = sequence.state()
    sequence.accept()
    assert (sequence.length, sequence.ahead, sequence.tokens.tolist()) == (4, 1, [5, 6, 7, 8])
    sequence.restore(state)
    assert (sequence.length, sequence.ahead) == (3, 2)
    for ids, count in (([5, 6, 7, 8], 3), ([5, 6], 2), ([5, 9, 7], 1), ([6], 0)):
        assert sequence.common_prefix(np.array(ids)) == count
    with pytest.raises(UserError, match="cannot rewind to 4: the cache holds 3 tokens"):
        sequence.rewind(4)
    sequence.overwrite(2)  # a run that begins in front, as at the cache's end
    sequence.extend(3, 5, exact=True)  # and a prompt's run behind rows that aren't exact
    assert (sequence.length, sequence.exact) == (5, 2)
    sequence.rewind(1)
    assert (sequence.length, sequence.exact, sequence.epoch) == (1, 1, 1)
