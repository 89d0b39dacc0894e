"""Sessions on TensorRT engines, against a stand-in for the GPU, ``fake_tensorrt.py``; never against a real one."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4export import cli
from glm4runtime import BundleError, SamplingParams, Session, UserError, load
from glm4runtime.backends.cuda import Cuda, open_cuda
from glm4runtime.backends.trt_module import import_flavour
from glm4runtime.contract import WEIGHTS, FileSpec, Manifest, read_manifest, sha256_of
from glm4runtime.contract.engine_spec import EngineSpec, Profile, engine_stem
from tests.conftest import Build
from tests.helpers import checkpoints, fake_tensorrt
from tests.helpers.fake_tensorrt import FakeCuda, FakeTensorRT, cudaError_t
from tests.helpers.walk import check_walk

ONE = (Profile("step", (1, 1, 4), (1, 1, 32), (1, 1, 16)),)
TWO = (Profile("prefill", (1, 1, 1), (1, 32, 32), (1, 1, 1)), Profile("decode", (1, 4, 4), (1, 1, 16), (1, 1, 16)))
DECODE_STEP = ["cudaMemset2DAsync", "cudaGraphLaunch", "cudaStreamSynchronize"]

Rig = tuple[FakeCuda, FakeTensorRT]


@pytest.fixture(scope="module")
def bundle(build_bundle: Build) -> Path:
    """A random model for TensorRT, without an engine."""
    return build_bundle(checkpoints.random_model(eos_token_id=[1], vocab_size=31), precision="fp32", target="tensorrt")


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Session:
    return load(bundle, provider="cpu")


@pytest.fixture
def engine(bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the bundle with an "engine" in it: the name of the bundle's step graph, and a sidecar."""

    def add(profiles: tuple[Profile, ...] = ONE, *, listed: bool = True, **changes: Any) -> Path:
        folder = tmp_path / "bundle"
        if not folder.exists():
            shutil.copytree(bundle, folder, copy_function=os.link)
        manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"), "manifest.json")
        text = str(bundle / "step.onnx")
        spec = EngineSpec(
            "tensorrt-rtx", "1.7.1", "8.9", "fp32", "standard", False, profiles,
            manifest.engine_graph_sha256, manifest.files[WEIGHTS].sha256, len(text), "",
        )  # fmt: skip
        spec = dataclasses.replace(spec, **changes)
        stem = folder / engine_stem(spec.flavour, spec.compute_capability)
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".engine").write_text(text)
        spec = dataclasses.replace(spec, sha256=sha256_of(stem.with_suffix(".engine")))
        stem.with_suffix(".json").write_text(spec.to_json())
        files = {}
        if listed:
            files = {path.relative_to(folder).as_posix(): FileSpec(path.stat().st_size, sha256_of(path))
                     for path in (stem.with_suffix(".engine"), stem.with_suffix(".json"))}  # fmt: skip
        kept = {name: file for name, file in manifest.files.items() if listed or not name.startswith("engines/")}
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text(dataclasses.replace(manifest, files={**kept, **files}).to_json())
        return folder

    return add


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Puts the stand-ins into the place of TensorRT and CUDA; no rule of theirs may be broken, to the very end."""
    made: list[FakeCuda] = []

    def put(profiles: tuple[Profile, ...] = ONE, *, flavour: str = "tensorrt_rtx") -> Rig:
        made.append(cuda := FakeCuda())
        module = FakeTensorRT(cuda, profiles, flavour=flavour)
        monkeypatch.setitem(sys.modules, flavour, module)
        monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        bindings = types.ModuleType("cuda.bindings")
        bindings.runtime = cuda  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        return cuda, module

    yield put
    gc.collect()
    assert not [rule for cuda in made for rule in cuda.broken_rules]


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
    assert len(sizes) == (5 + cache) + 5  # the third chunk is shorter
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


# Failures are told by the call's name


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cudaGetDeviceCount", "no CUDA device: cudaGetDeviceCount: cudaErrorNoDevice (as the driver puts it); an"),
        ("cudaDeviceGetAttribute", "cudaDeviceGetAttribute failed: cudaErrorNoDevice"),
    ],
)  # fmt: skip
def test_no_device(
    failing: str, message: str, engine: Callable[..., Path], rig: Callable[..., Rig],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cuda, _ = rig()
    cuda.failing[failing] = cudaError_t.cudaErrorNoDevice
    assert cli.main(["generate", str(engine()), "--raw", "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "no engine that runs here: " in error and message in error and error.count("\n") == 1
    assert "`--provider cpu` runs the same graph in ONNX Runtime, without a GPU" in error


@pytest.mark.parametrize("failing", ["cudaStreamCreateWithFlags", "cudaMemset", "cudaMallocHost", "cudaMemcpy"])
def test_a_call_that_fails_at_load(failing: str, engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    cuda.failing[failing] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match=f"{failing} failed: cudaErrorInvalidValue"):
        load(engine())
    gc.collect()
    assert not cuda.memory["device"] and not cuda.memory["pinned"]


def test_a_device_that_is_full(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    cuda.failing["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=r"the cache: 0.00 GB on the device: cudaMalloc failed: cudaErrorMem.*; free"):
        load(engine())


@pytest.mark.parametrize("failing", ["cudaGraphLaunch", "cudaStreamSynchronize", "cudaMemset2DAsync"])
def test_a_call_that_fails_in_the_loop(failing: str, engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    runner = load(engine()).runner
    runner.prefill([5, 6])
    cuda.failing[failing] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match=f"^{failing} failed: cudaErrorInvalidValue"):
        runner.decode(7)
    assert runner.length == 2


def test_an_engine_that_will_not_run(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    _, module = rig()
    module.broken = True
    with pytest.raises(UserError, match="execute_async_v3 failed"):
        load(engine())


# Which engine


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.6"}, "the version of TensorRT does not fit: the engine was built for 1.6, here is 1.7.1"),
        ({"compute_capability": "12.0"}, "the compute capability does not fit: the engine was built for 12.0, here is"),
        ({"graph_sha256": "0" * 64}, "the bundle's graph by its sha256 does not fit"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_fit(
    changes: dict[str, Any], reason: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig()
    folder = engine(**changes)
    with pytest.raises(UserError, match=r"no engine that runs here: .*--provider cpu") as caught:
        load(folder)
    assert reason in str(caught.value)


def test_the_first_engine_that_fits_is_taken(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    engine(compute_capability="12.0")
    folder = engine(compute_capability="8.9")
    assert load(folder).runner.prefill_chunk == 32
    assert len(list((folder / "engines").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "tensorrt-rtx-sm89.engine: missing; {} lists it"),
        (lambda path: path.write_text("x"), "tensorrt-rtx-sm89.engine: 1 bytes, {} says"),
        (lambda path: path.write_text("x" * path.stat().st_size), "sha256 .*, {} says .*; the file was"),
    ],
)  # fmt: skip
def test_a_damaged_engine(
    damage: Callable[[Path], Any], message: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig()
    folder = engine()
    damage(folder / "engines" / "tensorrt-rtx-sm89.engine")
    with pytest.raises(BundleError, match=message.format("the manifest")):
        load(folder, check_hashes=True)
    folder = engine(listed=False)
    damage(folder / "engines" / "tensorrt-rtx-sm89.engine")
    with pytest.raises(
        BundleError,
        match=message.format("its sidecar") if "sha256" not in message else "deserialize_cuda_engine failed",
    ):
        load(folder)


@pytest.mark.parametrize("changes", [{"version_compatible": False}, {"version_compatible": True}])
def test_hashes_count_of_listed_engines_only(
    changes: dict[str, Any], engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig()
    folder = engine(listed=False, **changes)
    with pytest.raises(
        BundleError, match=r"tensorrt-rtx-sm89\.json: the manifest doesn't list it; build the engine again"
    ):
        load(folder, check_hashes=True)


# Engines that hold host code, or stream


@pytest.mark.parametrize("damage", ["engine", "json"])
def test_host_code_runs_where_it_is_what_was_built(
    damage: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    """A version-compatible engine is loaded with ``engine_host_code_allowed``, its hashes compared unasked."""
    _, module = rig()
    module.host_code = True
    folder = engine(version_compatible=True, version="1.5.9")
    session = load(folder)
    assert module.runtime.engine_host_code_allowed is True and len(session.runner.prefill([5])) == 31
    path = folder / "engines" / f"tensorrt-rtx-sm89.{damage}"
    text = path.read_text()
    path.write_text(text.replace("1.5.9", "1.5.8") if damage == "json" else "x" * len(text))
    with pytest.raises(BundleError, match=rf"tensorrt-rtx-sm89\.{damage}: sha256 .* says .*; the file was changed"):
        load(folder)


def test_other_engines_may_hold_no_host_code(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    _, module = rig()
    module.host_code = True
    with pytest.raises(
        BundleError, match="deserialize_cuda_engine failed: engine_host_code_allowed is False; build the"
    ):
        load(engine())


def test_a_sidecar_that_is_not_the_manifests(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    folder = engine(version_compatible=True)
    manifest, name = read_manifest(folder), "engines/tensorrt-rtx-sm89.engine"
    files = {**manifest.files, name: FileSpec(manifest.files[name].size, "0" * 64)}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(
        BundleError, match=r"tensorrt-rtx-sm89\.json: the manifest has another engine; build the engine"
    ):
        load(folder)


def test_a_streaming_engine_gets_a_budget(
    engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    """Of what the device has left beside the cache, before the first context and before scratch memory is measured."""
    cuda, module = rig()
    module.streams = True
    runner = load(engine(weight_streaming=True)).runner
    names = cuda.names()
    budget = cuda.calls[names.index("weight_streaming_budget_v2")][1]
    assert budget == module.engine.weight_streaming_budget_v2 < module.engine.streamable_weights_size
    cache = 2 * runner.manifest.cache.layers
    assert names[: names.index("weight_streaming_budget_v2")].count("cudaMalloc") == cache + 1  # and the logits
    assert cuda.living()[0]._scratch[1] == module.engine.device_memory_size_v2 == 3000
    check_walk(runner, reference.runner, np.random.default_rng(0), 20)


def test_a_budget_that_is_refused(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """The sidecar says that it streams, and it doesn't."""
    rig()
    with pytest.raises(UserError, match=r"weight_streaming_budget_v2=\d+ failed: the budget can't be set"):
        load(engine(weight_streaming=True))


def test_a_file_that_is_no_engine(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    path = engine() / "engines" / "tensorrt-rtx-sm89.engine"
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(BundleError, match="deserialize_cuda_engine failed: not an engine; build the engine again"):
        load(path.parent.parent)


def test_an_engine_with_other_inputs(
    monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    """Its sidecar says that it is this bundle's, and it isn't."""
    rig()
    folder = engine()
    monkeypatch.setattr(
        fake_tensorrt.IExecutionContext, "set_tensor_address", lambda self, name, memory: name != "present.1.key"
    )
    with pytest.raises(BundleError, match=r"the engine has no tensor 'present\.1\.key'; build it again"):
        load(folder)


def test_a_profile_too_narrow_for_drafts(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    narrow = (Profile("step", (1, 1, 1), (1, 1, 32), (1, 1, 4)),)
    with pytest.raises(BundleError, match="none of its profiles serves a run of 5 tokens of one sequence with 5 rows"):
        load(engine(narrow))


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Path]) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UserError, match=r"cuda-python cannot be imported .*; pip install '\.\[tensorrt\]'"):
        open_cuda("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match=r"tensorrt_rtx is not installed; pip install '\.\[tensorrt-rtx\]'"):
        import_flavour("tensorrt-rtx")
    with pytest.raises(UserError, match=r"no engine that runs here: tensorrt_rtx is not installed; .*; `--provider"):
        load(engine())


def test_a_device_count_of_none() -> None:
    api = types.SimpleNamespace(cudaGetDeviceCount=lambda: (cudaError_t.cudaSuccess, 0))
    with pytest.raises(UserError, match="no CUDA device: cudaGetDeviceCount: none found"):
        Cuda(api)


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
