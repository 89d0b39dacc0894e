"""Many sequences on a TensorRT engine, against the stand-in for the GPU; never against a real one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import BundleError, Engine, Request, SamplingParams, Session, UserError
from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.providers import open_batch_runner
from glm4runtime.backends.settings import Settings
from glm4runtime.backends.trt_batch import EngineBatchRunner
from glm4runtime.contract import read_manifest
from glm4runtime.contract.engine_spec import Profile
from tests.helpers.fake_cuda import cudaError_t
from tests.runtime.trt.conftest import Rig

BATCH = (Profile("step", (1, 1, 5), (1, 1, 32), (1, 1, 16)),)
STEPS = (
    Profile("prefill", (1, 1, 1), (1, 32, 32), (1, 1, 1)),
    Profile("decode", (1, 1, 1), (1, 1, 16), (1, 1, 16)),
    Profile("steps", (1, 5, 5), (1, 1, 1), (1, 1, 1)),
)
SLOTS = 5
PROMPTS = ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], list(range(1, 30)))


def opened(folder: Path, slots: int = SLOTS, **settings: Any) -> BatchRunner:
    return open_batch_runner(folder, read_manifest(folder), Settings(prefill_chunk=8, **settings), slots=slots)


def prefill(runner: BatchRunner, slot: int, prompt: list[int]) -> np.ndarray:
    for first, last in runner.prompt_runs(0, len(prompt)):
        row = runner.prefill(slot, prompt[:last], first)
    return row.copy()


class Alone:
    """What onnxruntime gives for each text by itself."""

    def __init__(self, reference: Session) -> None:
        self.texts = [list(prompt) for prompt in PROMPTS]
        self._runner = reference.runner

    def row(self, text: int, token: int | None = None) -> np.ndarray:
        """The logits behind a text, with one more token."""
        if token is not None:
            self.texts[text].append(token)
        self._runner.rewind()
        return self._runner.prefill(self.texts[text]).copy()


@pytest.mark.parametrize("profiles", [BATCH, STEPS], ids=["one profile", "three"])
def test_rows_are_those_of_texts_alone(
    profiles: tuple[Profile, ...], engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    """Any slots, in any order, with others between whose rows stay; a draft; a prompt whose slot has moved."""
    cuda, _ = rig(profiles)
    runner, alone, rng = opened(engine(profiles)), Alone(reference), np.random.default_rng(0)
    assert isinstance(runner, EngineBatchRunner) and not runner.invariant and runner.granule == 1
    for slot, prompt in enumerate(PROMPTS):
        assert np.abs(prefill(runner, slot, prompt) - alone.row(slot)).max() <= 2e-5
    for slots in ([0], [4, 1], [3, 0, 2], [2], [1, 4, 0, 3], [4, 3, 2, 1, 0], [2, 4]):
        tokens = rng.integers(0, 31, len(slots)).tolist()
        rows = runner.step(slots, tokens, [len(alone.texts[slot]) for slot in slots])
        assert rows.shape == (len(slots), 31) and rows.dtype == np.float32
        for slot, token, row in zip(slots, tokens, rows, strict=True):
            assert np.abs(row - alone.row(slot, token)).max() <= 2e-5, f"slot {slot} of {slots}"
    ahead = runner.verify(4, [3, 4], len(alone.texts[4])).copy()
    assert np.abs(ahead[0] - alone.row(4, 3)).max() <= 2e-5 and np.abs(ahead[1] - alone.row(4, 4)).max() <= 2e-5
    runner.write_rows(1, 0, runner.read_rows(2, 0, 9))
    runner.copy_rows(2, 0, 9)
    rows = runner.step([1, 0], [7, 7], [9, 9])
    wanted = Alone(reference).row(2, 7)
    assert np.abs(rows - wanted).max() <= 2e-5
    if profiles == STEPS:
        assert [context._profile for context in cuda.living()] == [1, 1, 2, 2, 2]  # drafts; steps of 1, 2, 4 and 5


def test_a_filler_harms_nobody(engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session) -> None:
    """Steps of three sequences run four; whose place the filler has may be as full as a slot gets."""
    rig(BATCH)
    runner = opened(engine(BATCH))
    assert runner.max_seq_len == 63  # of the bundle's 64
    full = np.random.default_rng(1).integers(0, 31, 62).tolist()
    for slot in range(SLOTS):
        prefill(runner, slot, full)
    kept = [runner.read_rows(slot, 0, 62).copy() for slot in range(SLOTS)]
    for first in range(SLOTS):
        slots = [(first + i) % SLOTS for i in range(3)]
        runner.step(slots, [1, 2, 3], [62] * 3)
        assert all(np.array_equal(runner.read_rows(slot, 0, 62), kept[slot]) for slot in range(SLOTS))
    row = runner.step([3], [9], [62])[0]
    reference.runner.rewind()
    assert np.abs(row - reference.runner.prefill([*full, 9])).max() <= 2e-5
    with pytest.raises(UserError, match="rows 63 to 64 of slot 0: it holds 63 tokens"):
        runner.step([0], [1], [63])


def test_a_step_is_two_calls(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """Inputs, mask and logits are copied in the graph that is replayed."""
    cuda, _ = rig(BATCH)
    runner = opened(engine(BATCH))
    assert cuda.names().count("cudaStreamBeginCapture") == 4 and len(cuda.living()) == 5
    for slot, prompt in enumerate(PROMPTS):
        prefill(runner, slot, prompt)
    starts = [len(prompt) for prompt in PROMPTS]
    for slots in ([0, 1], [0, 1, 2], [0, 1, 2, 3, 4]):
        cuda.calls.clear()
        runner.step(slots, [1] * len(slots), starts[: len(slots)])
        assert cuda.names() == ["cudaGraphLaunch", "cudaStreamSynchronize"]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_an_engine_answers_as_a_session_does(
    slots: int, engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    cuda, _ = rig(BATCH)
    params = SamplingParams(max_new_tokens=12, min_new_tokens=12)
    with Engine.load(engine(BATCH), slots=slots, invariant=False, prefill_chunk=8) as opened_engine:
        requests = [Request(prompt, params=params, lookup=7 * (i % 2)) for i, prompt in enumerate(PROMPTS)]
        handles = [opened_engine.submit(request) for request in requests]
        for prompt, handle in zip(PROMPTS, handles, strict=True):
            assert list(handle.result().choices[0].tokens) == list(reference.generate(prompt, params))
        assert opened_engine.stats().slots == slots
    assert not cuda.memory["device"] and not cuda.handles and not cuda.living()


def test_everything_is_given_back(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """By closing, and by the last reference."""
    cuda, _ = rig(BATCH)
    runner = opened(engine(BATCH))
    runner.close()
    runner.close()
    assert not cuda.memory["device"] and not cuda.handles and not cuda.living()
    for call in (lambda: runner.step([0], [1], [0]), lambda: runner.prefill(0, [1], 0), lambda: runner.release(0)):
        with pytest.raises(UserError, match="this engine is closed"):
            call()
    other = opened(engine(BATCH))
    prefill(other, 0, PROMPTS[0])
    del other
    gc.collect()
    assert not cuda.memory["device"] and not cuda.memory["pinned"] and not cuda.handles and not cuda.living()


def test_without_a_graph_the_same_rows(
    engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    _, module = rig(BATCH)
    module.capturable = False
    with pytest.warns(UserWarning, match="decode steps run without a CUDA graph, and slower: is_stream_capturable"):
        runner = opened(engine(BATCH), slots=2)
    alone = Alone(reference)
    for slot in (0, 1):
        prefill(runner, slot, PROMPTS[slot])
    rows = runner.step([1, 0], [2, 3], [1, 3])
    assert np.abs(rows - [alone.row(1, 2), alone.row(0, 3)]).max() <= 2e-5


@pytest.mark.parametrize("failing", ["cudaMemset", "cudaMallocHost", "cudaMalloc"])
def test_a_call_that_fails_at_load(failing: str, engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig(BATCH)
    cuda.failing[failing] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=f"{failing} failed: cudaErrorMemoryAllocation"):
        opened(engine(BATCH))
    gc.collect()
    assert not cuda.memory["device"] and not cuda.memory["pinned"]


def test_a_call_that_fails_in_a_step(engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session) -> None:
    """It is told; the next step is right again, whatever the host's inputs were left as."""
    cuda, _ = rig(BATCH)
    runner, alone = opened(engine(BATCH)), Alone(reference)
    for slot in (0, 1):
        prefill(runner, slot, PROMPTS[slot])
    cuda.failing["cudaGraphLaunch"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match="cudaGraphLaunch failed"):
        runner.step([0, 1], [30, 30], [3, 1])
    cuda.failing.clear()
    rows = runner.step([0, 1], [2, 3], [3, 1])
    assert np.abs(rows - [alone.row(0, 2), alone.row(1, 3)]).max() <= 2e-5


def test_engines_that_are_for_fewer(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    alone = (Profile("step", (1, 1, 1), (1, 1, 32), (1, 1, 16)),)
    rig(alone)
    folder = engine(alone)
    told = (
        r"no engine that runs here: engines/tensorrt-rtx-sm89.engine: was built for steps of 1 sequence, and slots=8; "
        r"build it again with `glm4export engine BUNDLE --max-batch 8`, or open slots=1; bundles for cpu and cuda"
    )
    with pytest.raises(UserError, match=told):
        Engine.load(folder, invariant=False)
    assert opened(folder, slots=1).max_seq_len == 64  # no fillers
    odd = (Profile("step", (3, 3, 8), (1, 1, 32), (1, 1, 16)), *alone)
    rig(odd)
    with pytest.raises(BundleError, match="a run of 1 tokens of each of 2 sequences with 1 rows of logits"):
        opened(engine(odd), slots=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"invariant": True}, "invariant is not for engines: .* never measured on one; load it with invariant=False"),
        ({"provider": "cpu"}, "whose graph takes one sequence in ONNX Runtime here, and several on an engine"),
        ({"cuda_graphs": True}, "this one is for tensorrt and runs on engine, whose steps are captured anyway"),
        ({"gpu_mem_limit": 3.0}, "gpu_mem_limit is for cuda, this session runs on engine"),
        ({"max_seq_len": 65}, r"max_seq_len=65 is not in 1\.\.64"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], message: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig(BATCH)
    with pytest.raises(UserError, match=message):
        opened(engine(BATCH), **settings)
