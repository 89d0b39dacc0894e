"""A runner of many sequences: its slots, its devices, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi import onnxruntime_inference_collection as ort_collection

from glm4runtime import Engine, UserError
from glm4runtime.backends import cuda, ort, ort_batch, ort_session, stages
from glm4runtime.backends.gpu_options import GpuOptions
from glm4runtime.backends.invariance import find_batch_granule
from glm4runtime.backends.ort_batch import OrtBatchRunner
from glm4runtime.backends.providers import open_batch_runner
from glm4runtime.backends.settings import Settings
from glm4runtime.contract import read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.batches import opened
from tests.helpers.fake_cuda import FakeCuda


@pytest.fixture(scope="module")
def small(build_bundle: Build) -> Path:
    """A random model with room for 64 tokens."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=31)
    return build_bundle(model, precision="fp32", target="cpu")


@pytest.mark.parametrize("slots", [1, 3, 11])
def test_as_many_slots_as_there_are(slots: int, small: Path) -> None:
    """All at once up to the last row, without a granule and with one."""
    found = []
    for invariant in (False, True):
        runner = opened(small, slots=slots, max_seq_len=8, invariant=invariant)
        assert runner.invariant is invariant and (invariant or runner.granule == runner.prompt_granule == 1)
        prompts = [[1 + slot, 2, 3][: 1 + slot % 3] for slot in range(slots)]
        for slot, prompt in enumerate(prompts):
            runner.prefill(slot, prompt, 0)
        rows = []
        for at in range(5):
            order = np.random.default_rng(at).permutation(slots).tolist()
            logits = runner.step(order, [5 + at] * slots, [len(prompts[slot]) + at for slot in order])
            rows.append(logits[np.argsort(order)])
        assert runner.step([slots - 1], [5], [7]).shape == (1, 31)
        found.append(np.stack(rows))
    assert np.abs(found[0] - found[1]).max() <= 2e-5


def test_graphs_with_positions_run_one_by_one(build_bundle: Build) -> None:
    """They append to all sequences of a run at one row."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=31)
    bundles = [build_bundle(model, precision="fp32", target="cpu", position_ids=given) for given in (True, False)]
    rows = []
    for bundle in bundles:
        runner = opened(bundle, slots=3, max_seq_len=16)
        for slot, prompt in enumerate(([1, 2, 3], [4], [5, 6])):
            runner.prefill(slot, prompt, 0)
        rows.append(runner.step([2, 0, 1], [7, 8, 9], [2, 3, 1]).copy())
    assert np.abs(rows[0] - rows[1]).max() <= 2e-5


def test_graphs_with_positions_reach_the_caches_end(build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps have fillers behind them where runs are even: the last row is kept for those."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=31)
    bundle = build_bundle(model, precision="fp32", target="cpu", position_ids=True)
    monkeypatch.setattr(ort_batch, "find_granule", lambda lane: 2)
    runner, plain = opened(bundle, slots=2, max_seq_len=16), opened(bundle, slots=2, max_seq_len=16, invariant=False)
    assert (runner.prompt_granule, runner.max_seq_len, plain.max_seq_len) == (2, 15, 16)
    prompts = [list(range(1, 16))[:length] for length in (12, 15)]
    for slot, prompt in enumerate(prompts):
        rows = [one.prefill(slot, prompt, 0) for one in (runner, plain)]
        assert np.abs(rows[0] - rows[1]).max() <= 2e-5
    beside = runner.read_rows(1, 0, 15)
    for at in (12, 13, 14):
        rows = [one.step([0], [at], [at]).copy() for one in (runner, plain)]
        assert np.abs(rows[0] - rows[1]).max() <= 2e-5
    assert np.array_equal(runner.read_rows(1, 0, 15), beside)
    with pytest.raises(UserError, match="rows 15 to 16 of slot 0: it holds 15 tokens"):
        runner.step([0], [1], [15])


def test_rows_that_a_move_lost_are_used_by_nobody(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops half-way: both sequences are told at their next run, and slots are good for the next ones."""
    runner = opened(small, slots=3, max_seq_len=16, invariant=False)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    for slot, prompt in enumerate(prompts):
        runner.prefill(slot, prompt, 0)
    wanted = runner.step([0, 1, 2], [9, 9, 9], [3, 2, 4]).copy()

    def fail(*rows: int) -> None:
        raise RuntimeError("no copy")

    monkeypatch.setattr(runner._pool, "copy", fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="no copy"):
        runner.step([2], [9], [4])
    monkeypatch.undo()
    for lost, call in (
        (0, lambda: runner.step([0, 1], [9, 9], [3, 2])),
        (2, lambda: runner.step([2], [9], [4])),
        (0, lambda: runner.verify(0, [9], 3)),
        (2, lambda: runner.prefill(2, prompts[2], 2)),
        (0, lambda: runner.read_rows(0, 0, 1)),
        (2, lambda: runner.write_rows(2, 1, np.zeros(runner.row_bytes, np.uint8))),
        (0, lambda: runner.copy_rows(0, 1, 2)),
    ):
        with pytest.raises(RuntimeError, match=f"the rows of slot {lost} were lost: moving them"):
            call()
    assert np.abs(runner.step([1], [9], [2])[0] - wanted[1]).max() <= 2e-5
    runner.release(0)
    runner.prefill(0, prompts[0], 0)
    runner.prefill(2, prompts[2], 0)
    assert np.abs(runner.step([0, 2], [9, 9], [3, 4]) - wanted[[0, 2]]).max() <= 2e-5


def test_a_pool_on_a_device_holds_what_one_on_the_host_does(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of devices, on memory that a stand-in for CUDA and ONNX Runtime own."""
    host = opened(small, slots=3, max_seq_len=16)
    on_cpu = ort_collection.OrtDevice.make("cpu", 0)
    monkeypatch.setattr(ort_collection.OrtDevice, "make", lambda name, *ids: on_cpu)
    monkeypatch.setattr(ort, "device_of", lambda provider: "cuda")
    api = FakeCuda()
    monkeypatch.setattr(ort_batch, "open_cuda", lambda extra: cuda.Cuda(api))
    device = opened(small, slots=3, max_seq_len=16)
    found = []
    for runner in (host, device):
        for slot, prompt in enumerate(([1, 2, 3], [4], [5, 6])):
            runner.prefill(slot, prompt, 0)
        logits = [runner.step([2, 0], [7, 8], [2, 3]).tobytes(), runner.step([1], [9], [1]).tobytes()]
        runner.copy_rows(0, 1, 4)
        runner.write_rows(2, 3, runner.read_rows(0, 3, 4))
        logits.append(runner.step([1, 2, 0], [3, 3, 3], [4, 4, 4]).tobytes())
        found.append([*logits, *(runner.read_rows(slot, 0, 5).tobytes() for slot in range(3))])
        runner.close()
    assert found[0] == found[1]
    assert not api.memory["device"] and "cudaMemcpy2D" in api.names()


def test_all_of_it_is_on_the_device_that_was_chosen(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = ort_collection.OrtDevice.make("cpu", 0)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ort_collection.OrtDevice, "make", lambda *where: asked.append(where) or on_cpu)
    monkeypatch.setattr(ort, "device_of", lambda provider: "cuda")
    api = FakeCuda()
    monkeypatch.setattr(ort_batch, "open_cuda", lambda extra: cuda.Cuda(api))
    runner = OrtBatchRunner(
        small, read_manifest(small), slots=3, provider="cpu", max_seq_len=16, gpu=GpuOptions(device_id=1)
    )
    api.calls.clear()
    runner.prefill(0, [1, 2, 3], 0)
    runner.verify(0, [4, 5], 3)
    runner.step([0], [6], [5])
    runner.write_rows(1, 0, runner.read_rows(0, 0, 4))
    runner.copy_rows(1, 2, 4)
    runner.close()
    assert {where[1] for where in asked if where[0] == "cuda"} == {1}
    devices = [call[1:] for call in api.calls if call[0] == "cudaSetDevice"]
    assert len(devices) == 4 and set(devices) == {(1,)}
    for index, name in enumerate(api.names()):  # what waits waits for that device
        assert name != "cudaDeviceSynchronize" or "cudaSetDevice" in api.names()[:index]


@pytest.mark.parametrize(("precision", "chunk"), [("fp16", 512), ("int4", 2048)])
def test_options_of_a_gpu_reach_the_runner(
    precision: str, chunk: int, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(ort_batch, "OrtBatchRunner", lambda folder, manifest, **settings: given.update(settings))
    monkeypatch.setattr(ort_session, "require_provider", lambda *started: given.update(started=started))
    manifest = replace(read_manifest(small), precision=precision)
    settings = Settings(provider="cuda", device_id=1, gpu_mem_limit=4)
    open_batch_runner(small, manifest, settings, slots=2)
    assert (given["gpu"], given["prefill_chunk"], given["started"]) == (GpuOptions(1, 4), chunk, ("cuda", 1))
    with pytest.raises(UserError, match="device_id=1 is for cuda and tensorrt, this session runs on cpu; leave it out"):
        Engine.load(small, device_id=1)
    with pytest.raises(UserError, match="gpu_mem_limit is for cuda, this session runs on cpu; leave it out"):
        Engine.load(small, gpu_mem_limit=4)


def test_a_limit_leaves_room_for_all_caches(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a GPU on the CPU: what their sessions were to take."""
    limits: list[int] = []
    on_cpu = stages.open_session

    def opened_on_cpu(path: Path, provider: str, threads: int, *, optimized: bool, options: Any) -> Any:
        limits.append(int(options["gpu_mem_limit"]))
        return on_cpu(path, "cpu", threads)

    monkeypatch.setattr(stages, "open_session", opened_on_cpu)
    monkeypatch.setattr(ort, "device_of", lambda provider: "cpu")
    manifest = read_manifest(small)
    settings: dict[str, Any] = {"slots": 3, "provider": "cuda", "max_seq_len": 16, "gpu": GpuOptions(0, 1)}
    cache = 16 * manifest.cache.bytes_per_token
    runner = OrtBatchRunner(small, manifest, **settings)
    assert limits == [(10**9 - 4 * cache) // len(limits)] * len(limits)
    quantized = replace(manifest, precision="int8")  # as far as the runner is told
    assert runner.draft_rows == 16
    assert OrtBatchRunner(small, quantized, **settings).draft_rows == 5 - 5 % runner.prompt_granule
    monkeypatch.setattr(ort_batch, "find_batch_granule", lambda *_: 4)
    with pytest.raises(UserError, match=r"steps take multiples of 4 sequences on this GPU, .* 1 cache more .*, not 3"):
        OrtBatchRunner(small, manifest, **settings)


LAWS: dict[str, tuple[Callable[[int, int], bool], int | None]] = {
    "no batch shows": (lambda row, count: False, 1),
    "a lone row": (lambda row, count: count == 1, 2),
    "the last row of an odd batch": (lambda row, count: count % 2 == 1 and row == count - 1, 2),
    "rows behind the last four": (lambda row, count: row >= count - count % 4, 4),
    "rows behind the last eight": (lambda row, count: row >= count - count % 8, 8),
    "the widest batch": (lambda row, count: count > 8, None),
    "every place": (lambda row, count: True, None),
}


@pytest.mark.parametrize("law", LAWS)
def test_the_granule_is_what_the_law_says(law: str) -> None:
    shows, granule = LAWS[law]

    def step(sequences: Sequence[int]) -> list[bytes]:
        count = len(sequences)
        return [bytes([one, count, row] if shows(row, count) else [one]) for row, one in enumerate(sequences)]

    assert find_batch_granule(step, 8, 16) == granule


def test_refusals(small: Path, build_bundle: Build, tensorrt_bundles: Callable[[str], Path]) -> None:
    runner = opened(small, slots=2, max_seq_len=16, prefill_chunk=4)
    with pytest.raises(UserError, match=r"^rows 0 to 17 of slot 1: it holds 16 tokens"):
        runner.prefill(1, [1] * 17, 0)
    with pytest.raises(UserError, match=r"^a step: token id 31 is not a whole number in 0\.\.30"):
        runner.step([0, 1], [1, 31], [0, 0])
    with pytest.raises(UserError, match=r"^rows 16 to 17 of slot 0: it holds 16"):
        runner.step([1, 0], [1, 1], [0, 16])
    with pytest.raises(UserError, match=r"rows 15 to 1[78] of slot 0: it holds 16"):
        runner.verify(0, [1, 2], 15)
    assert runner.verify(0, [1], 16 - runner.prompt_granule).shape == (1, 31)  # there fillers have room as well
    for draft in ([], [1] * 17):
        with pytest.raises(ValueError, match=r"verify: \d+ tokens, expected 1 to 16"):
            runner.verify(0, draft, 0)
    with pytest.raises(ValueError, match=r"prefill: rows 0 to 9 are 3 runs; prompt_runs\(\) says which"):
        runner.prefill(0, [1] * 9, 0)
    for slots, tokens, starts in (([], [], []), ([0, 0], [1, 1], [0, 0]), ([0, 1], [1], [0, 0])):
        with pytest.raises(ValueError, match="one each, once"):
            runner.step(slots, tokens, starts)
    with pytest.raises(ValueError, match=r"slot 2 is not in 0\.\.1"):
        runner.step([2], [1], [0])
    with pytest.raises(ValueError, match=r"rows 3 to 2 of slot 0: no such range"):
        runner.read_rows(0, 3, 2)
    block = runner.read_rows(0, 0, 3)
    for wrong in (block[1:], block.view(np.int8)):
        with pytest.raises(ValueError, match=rf"not uint8 rows of {runner.row_bytes} bytes"):
            runner.write_rows(0, 0, wrong)
    with pytest.raises(UserError, match="rows 14 to 17 of slot 0: it holds 16"):
        runner.write_rows(0, 14, block)
    runner.close()
    runner.close()
    for call in (
        lambda: runner.step([0], [1], [0]),
        lambda: runner.prefill(0, [1], 0),
        lambda: runner.verify(0, [1], 0),
        lambda: runner.read_rows(0, 0, 1),
        lambda: runner.write_rows(0, 0, block),
        lambda: runner.release(0),
    ):
        with pytest.raises(UserError, match="this engine is closed; load the bundle again"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"slots": 1.5}, "slots=1.5 is not a whole number"),
        ({"slots": 257}, "slots=257: at most 256 sequences run at once"),
        ({"max_seq_len": 0}, r"max_seq_len=0 is not in 1\.\.64"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be at least 1"),
        ({"invariant": 1}, "invariant=1 is not True or False"),
        ({"provider": "engine"}, "provider 'engine' runs bundles built with `--target tensorrt`"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str, small: Path) -> None:
    with pytest.raises(UserError, match=message):
        opened(small, **{"max_seq_len": 16, **options})


def test_bundles_for_tensorrt_are_refused(tensorrt_bundles: Callable[[str], Path]) -> None:
    with pytest.raises(
        UserError,
        match=r"built for tensorrt, whose graph takes one sequence in ONNX .* `--target cpu` or `--target cuda`",
    ):
        opened(tensorrt_bundles("fp16"), max_seq_len=16)
