"""Sessions on TensorRT engines, against a stand-in for the GPU, ``fake_tensorrt.py``; never against a real one."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glm4runtime import SamplingParams, Session, UserError, load
from glm4runtime.contract.engine_spec import Profile
from tests.helpers.fake_cuda import cudaError_t
from tests.helpers.walk import check_walk
from tests.runtime.trt.conftest import ONE, Rig

TWO = (Profile("prefill", (1, 1, 1), (1, 32, 32), (1, 1, 1)), Profile("decode", (1, 1, 4), (1, 1, 16), (1, 1, 16)))
DECODE_STEP = ["cudaMemset2DAsync", "cudaGraphLaunch", "cudaStreamSynchronize"]


def test_any_order_of_calls_gives_onnxruntimes_logits(
    engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    for profiles in (ONE, TWO):
        cuda, _ = rig(profiles)
        runner = load(engine(profiles), prefill_chunk=5 if profiles == ONE else 20).runner
        for seed in range(4):
            assert len(check_walk(runner, reference.runner, np.random.default_rng(seed), 40)) == 4
        assert ("set_optimization_profile_async", 1) in cuda.calls or profiles == ONE


@pytest.mark.parametrize("lookup", [0, 7])
def test_greedy_tokens(lookup: int, engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session) -> None:
    rig()
    params, prompt = SamplingParams(max_new_tokens=58), [5, 6, 7, 5, 6]
    session = load(engine())
    assert list(session.generate(prompt, params, lookup=lookup)) == list(reference.generate(prompt, params))


def test_a_decode_step_is_three_calls(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """One cell of the mask, the graph's replay, and the wait for it. The cache is where it was."""
    cuda, _ = rig()
    runner = load(engine()).runner
    runner.prefill([5, 6, 7])
    runner.decode(8)
    for position in (4, 5):
        cuda.calls.clear()
        runner.decode(8)
        assert cuda.names() == DECODE_STEP
        (_, _, _, value, width, height, _) = cuda.calls[0]
        assert (value, width, height) == (1, 1, 1) and runner.length == position + 1


def test_order_of_a_prompts_calls(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    runner = load(engine(), prefill_chunk=4).runner
    cuda.calls.clear()
    runner.prefill([5, 6, 7, 8, 9, 10, 11, 12, 13])
    sizes = [name for name in cuda.names() if name == "set_input_shape"]
    steps = [name for name in cuda.names() if name != "set_input_shape"]
    run = ["cudaMemcpyAsync", "execute_async_v3", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    assert steps == [
        "set_optimization_profile_async", *run,  # the mask starts as that of the first chunk
        "cudaMemset2DAsync", *run,
        "cudaMemset2DAsync", *run,
    ]  # fmt: skip
    cache = 2 * runner.manifest.cache.layers
    assert len(sizes) == (5 + cache) + 3  # the third chunk is shorter: tokens, positions, mask
    executed = [shapes for name, shapes in (call for call in cuda.calls if call[0] == "execute_async_v3")]
    assert [shapes["input_ids"] for shapes in executed] == [(1, 4), (1, 4), (1, 1)]
    assert executed[0]["attention_mask"] == (1, 1, 4, 64) and executed[0]["logit_rows"] == (1, 1)
    assert executed[0]["past_key_values.0.key"] == (1, 2, 64, 32)


def test_past_and_present_are_one_buffer_in_both_contexts(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    session = load(engine())
    token, many = (context._addresses for context in cuda.living())
    for layer in range(2):
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            assert token[past] == token[present] == many[past] == many[present]
    assert token["logits"] == many["logits"] and token["input_ids"] != many["input_ids"]
    assert len({token[name] for name in token}) == len(token) - 4
    assert cuda.living()[0]._scratch == cuda.living()[1]._scratch
    assert session.runner.device == "cuda"
    captured = cuda.living()[0]._config  # waits for its kernels, see trt_context._create
    assert captured.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    names = cuda.names()
    assert names.index("cudaDeviceSynchronize") < names.index("execute_async_v3")
    assert max(i for i, name in enumerate(names) if name in ("cudaMalloc", "cudaMemset", "cudaMemcpy")) < names.index(
        "cudaDeviceSynchronize"
    )


def test_full_tensorrt_has_no_kernels_to_wait_for(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig(flavour="tensorrt")
    session = load(engine(flavour="tensorrt"))
    assert [context._config.name for context in cuda.living()] == ["USER_MANAGED"] * 2
    assert session.runner.length == 0


def test_the_profile_of_each_kind_of_run(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig(TWO)
    runner = load(engine(TWO), prefill_chunk=512).runner
    assert runner.prefill_chunk == 32  # what the longest profile takes
    runner.prefill([5] * 17)
    runner.decode(8)
    runner.verify([9, 10])
    runner.prefill([5] * 16)  # no more than drafts have: the profile for shorter runs serves it
    assert [context._profile for context in cuda.living()] == [1, 1]
    switches = [call[1] for call in cuda.calls if call[0] == "set_optimization_profile_async"]
    assert switches == [1, 0, 1]  # decode steps; the prompt; the draft


def test_everything_is_given_back(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """In an order that the fake's rules allow: graph, contexts, engine, runtime, memory, stream."""
    cuda, _ = rig()
    session = load(engine())
    row = session.runner.prefill([5, 6, 7])
    assert cuda.handles and cuda.memory["device"] and len(cuda.memory["pinned"]) == 3 and len(cuda.contexts) == 2
    del session
    gc.collect()
    assert not cuda.broken_rules and not cuda.contexts
    assert not cuda.handles and not cuda.memory["device"] and len(cuda.memory["pinned"]) == 1  # the row's
    del row
    gc.collect()
    assert not cuda.memory["pinned"]


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("cudaStreamBeginCapture", r"cudaStreamBeginCapture failed: cudaErrorStreamCaptureUnsupported \(as the driver"),
        ("cudaStreamEndCapture", "cudaStreamEndCapture failed: cudaErrorStreamCaptureUnsupported"),
        ("cudaGraphInstantiate", "cudaGraphInstantiate failed: cudaErrorStreamCaptureUnsupported"),
        (None, "is_stream_capturable says no"),
    ],
)
def test_without_a_graph_the_same_logits(
    failing: str | None, reason: str, engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    cuda, module = rig()
    if failing:
        cuda.failing[failing] = cudaError_t.cudaErrorStreamCaptureUnsupported
    else:
        module.capturable = False
    with pytest.warns(UserWarning, match=f"decode steps run without a CUDA graph, and slower: {reason}"):
        runner = load(engine()).runner
    cuda.captured = None  # a capture that could not be ended leaves the stand-in's stream in it
    cuda.failing.clear()
    check_walk(runner, reference.runner, np.random.default_rng(0), 30)
    cuda.calls.clear()
    runner.rewind()
    runner.decode(3)
    assert cuda.names()[-4:] == ["cudaMemcpyAsync", "execute_async_v3", "cudaMemcpyAsync", "cudaStreamSynchronize"]


def test_a_forked_child_neither_uses_nor_frees_it(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    session = load(engine())
    session.runner.prefill([5, 6, 7])
    cuda.calls.clear()
    if not (child := os.fork()):
        try:
            session.runner.decode(5)
        except UserError as error:
            del session
            gc.collect()
            os._exit(0 if "load the bundle in the child" in str(error) and not cuda.calls else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(session.runner.decode(5)) == 31


def test_closing_gives_everything_back(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """At once, though a generation holds on to the runner; pinned memory goes with the last row that lies in it."""
    cuda, _ = rig()
    with load(engine()) as session:
        generation = session.generate([5, 6, 7])
        next(generation)
    assert not cuda.memory["device"] and not cuda.handles and not cuda.living()
    calls = len(cuda.calls)
    session.close()
    with pytest.raises(UserError, match="this session is closed; load the bundle again"):
        next(generation)
    assert len(cuda.calls) == calls
    del generation
    gc.collect()
    assert not cuda.memory["pinned"]
