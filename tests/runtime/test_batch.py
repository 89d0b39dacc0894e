"""Many sequences at once: a row's logits and cache have the same bits alone and in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi import onnxruntime_inference_collection as ort_collection

from glm4runtime import Engine, Session, UserError
from glm4runtime.backends import cuda, ort, ort_batch, ort_session, pool, stages
from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.gpu_options import GpuOptions
from glm4runtime.backends.invariance import find_batch_granule
from glm4runtime.backends.ort_batch import OrtBatchRunner
from glm4runtime.backends.pool import DevicePool, HostPool
from glm4runtime.backends.providers import open_batch_runner
from glm4runtime.backends.settings import Settings
from glm4runtime.contract import CacheSpec, read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.fake_cuda import FakeCuda, cudaError_t
from tests.helpers.kernels import KERNELS

CHUNK, SLOTS, STEPS = 32, 8, 3
LENGTHS = (5, 40, 101, 1, 2, 64, 33, 77)  # of prompts: less than a chunk, several, odd, a lone token


def opened(bundle: Path, **options: Any) -> BatchRunner:
    slots = options.pop("slots", SLOTS)
    given = {"provider": "cpu", "threads": 2, "max_seq_len": 231, "invariant": True, "prefill_chunk": CHUNK, **options}
    return open_batch_runner(bundle, read_manifest(bundle), Settings(**given), slots=slots)


@pytest.fixture(scope="module", params=[name for name in KERNELS if name != "a step graph"])
def runner(request: pytest.FixtureRequest, kernel_bundles: Callable[[str], Path]) -> BatchRunner:
    try:
        return opened(kernel_bundles(request.param))
    except UserError as error:
        pytest.skip(str(error))


class Texts:
    """Random prompts and what follows them, and what a runner gives for each alone."""

    def __init__(self, runner: BatchRunner) -> None:
        rng = np.random.default_rng(0)
        self.runner = runner
        self.prompts = [rng.integers(0, runner.vocab_size, length) for length in LENGTHS]
        self.next = rng.integers(0, runner.vocab_size, (len(LENGTHS), STEPS)).tolist()
        self.alone: list[tuple[list[np.ndarray], np.ndarray]] = []
        for text in range(len(LENGTHS)):
            rows = [self.prefill(0, text)]
            for at in range(STEPS):
                rows.append(runner.step([0], [self.next[text][at]], [LENGTHS[text] + at])[0].copy())
            self.alone.append((rows, runner.read_rows(0, 0, LENGTHS[text] + STEPS)))

    def prefill(self, slot: int, text: int, start: int = 0, width: int | None = None) -> np.ndarray:
        """The last token's logits of a whole prompt, in the runs that the runner asks for."""
        for first, last in self.runner.prompt_runs(start, LENGTHS[text], width):
            row = self.runner.prefill(slot, self.prompts[text][:last], first).copy()
        return row

    def step(self, of: dict[int, int], at: int, slots: Sequence[int]) -> None:
        """Step ``at`` of the texts that the slots have, compared with what each gives alone."""
        tokens, starts = [self.next[of[slot]][at] for slot in slots], [LENGTHS[of[slot]] + at for slot in slots]
        rows = self.runner.step(slots, tokens, starts)
        assert rows.shape == (len(slots), self.runner.vocab_size) and rows.dtype == np.float32
        for slot, row in zip(slots, rows, strict=True):
            assert np.array_equal(row, self.alone[of[slot]][0][1 + at]), f"text {of[slot]} among {len(slots)}"

    def cache_is_right(self, slot: int, text: int, rows: int | None = None) -> bool:
        rows = LENGTHS[text] + STEPS if rows is None else rows
        block = self.alone[text][1].reshape(2 * self.runner.manifest.cache.layers, -1)
        found = self.runner.read_rows(slot, 0, LENGTHS[text] + STEPS).reshape(block.shape)
        heads = self.runner.manifest.cache.kv_heads

        def first(every: np.ndarray) -> bytes:
            return every.reshape(len(every), heads, LENGTHS[text] + STEPS, -1)[:, :, :rows].tobytes()

        return first(found) == first(block)


@pytest.fixture(scope="module")
def texts(runner: BatchRunner) -> Texts:
    return Texts(runner)


def test_granules_are_found_here(runner: BatchRunner) -> None:
    assert runner.granule in (1, 2, 4, 8) and runner.prompt_granule in (1, 2, 4, 8) and runner.invariant
    coarse = runner.manifest.cache.dtype == "int8"
    assert runner.prompt_grid == (CHUNK if coarse else runner.prompt_granule)
    assert runner.row_bytes == runner.manifest.cache.bytes_per_token


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_same_bits_in_every_batch(count: int, texts: Texts) -> None:
    """Any texts, in any slots, in another order in every step, and others between whose rows stay."""
    rng = np.random.default_rng(count)
    slots, chosen = rng.permutation(SLOTS)[:count].tolist(), rng.permutation(len(LENGTHS))[:count].tolist()
    of = dict(zip(slots, chosen, strict=True))
    for slot, text in of.items():
        assert np.array_equal(texts.prefill(slot, text), texts.alone[text][0][0])
    for at in range(STEPS):
        texts.step(of, at, rng.permutation(slots).tolist())
    assert all(texts.cache_is_right(slot, text) for slot, text in of.items())


def test_subsets_and_a_prompt_between_steps(texts: Texts) -> None:
    """Slots that wait or have half a prompt are moved out of the way, and no filler writes there."""
    runner, of = texts.runner, dict(enumerate(range(SLOTS)))
    half = {2: 64, 5: 32}  # slots with a prompt under way: rows they have
    for slot, text in of.items():
        for first, last in runner.prompt_runs(0, LENGTHS[text]):
            if last <= half.get(slot, LENGTHS[text]):
                runner.prefill(slot, texts.prompts[text][:last], first)
    done = dict.fromkeys(of, 0)
    for slots in ([0], [7, 0, 3], [6, 1], [4], [4, 1, 3, 6, 7], [6], [0, 4, 7, 3, 1]):
        for at in {done[slot] for slot in slots}:
            texts.step(of, at, [slot for slot in slots if done[slot] == at])
        for slot in slots:
            done[slot] += 1
        for slot, rows in half.items():
            assert texts.cache_is_right(slot, of[slot], rows)
    for slot, rows in half.items():
        assert np.array_equal(texts.prefill(slot, of[slot], rows), texts.alone[of[slot]][0][0])
    for at in range(STEPS):
        texts.step(of, at, list(half))
    for slot, text in of.items():
        assert texts.cache_is_right(slot, text, LENGTHS[text] + done[slot] if slot not in half else None)


def test_same_bits_for_every_width_of_runs(texts: Texts) -> None:
    for text, width in ((2, 1), (2, 7), (7, 16), (5, 31), (1, 4096)):
        borders = texts.runner.prompt_runs(0, LENGTHS[text], width)
        assert [first for first, _ in borders[1:]] == [last for _, last in borders[:-1]]
        assert max(last - first for first, last in borders) <= CHUNK
        assert np.array_equal(texts.prefill(1, text, width=width), texts.alone[text][0][0])
        assert texts.cache_is_right(1, text, LENGTHS[text])


def test_rows_given_back_are_a_prefix(texts: Texts) -> None:
    """A prefix hit: rows of another slot, read, written in two blocks, and the rest of the prompt behind them."""
    runner, text = texts.runner, 2
    grid = runner.prompt_grid
    rows = (LENGTHS[text] - 1) // grid * grid
    texts.prefill(6, text)
    blocks = [(first, runner.read_rows(6, first, end)) for first, end in ((0, 37), (37, rows))]
    assert all(block.dtype == np.uint8 and block.ndim == 1 for _, block in blocks)
    assert sum(block.size for _, block in blocks) == rows * runner.row_bytes
    texts.prefill(6, 5)
    runner.release(3)
    for first, block in blocks:
        runner.write_rows(3, first, block)
    texts.step({6: 5}, 0, [6])  # moves what was written
    assert np.array_equal(texts.prefill(3, text, rows), texts.alone[text][0][0])
    assert np.array_equal(texts.prefill(3, text, LENGTHS[text]), texts.alone[text][0][0])  # all of it is there
    texts.step({3: text}, 0, [3])
    assert texts.cache_is_right(3, text, LENGTHS[text] + 1)


def test_copied_rows_go_their_own_way(texts: Texts) -> None:
    """As several answers to one prompt do, or beams."""
    runner = texts.runner
    texts.prefill(4, 7)
    for slot in (0, 6):
        runner.copy_rows(4, slot, LENGTHS[7])
    runner.step([0, 6], [3, 4], [LENGTHS[7]] * 2)
    for at in range(STEPS):
        texts.step({0: 7, 4: 7, 6: 7}, at, [6, 4, 0])
    assert all(texts.cache_is_right(slot, 7) for slot in (0, 4, 6))


def test_drafts(texts: Texts) -> None:
    """A draft's logits are those of steps but for rounding, whatever its width, and its rows may be taken back."""
    runner = texts.runner
    texts.prefill(2, 1)
    wanted = runner.verify(2, texts.next[1], LENGTHS[1]).copy()
    assert wanted.shape == (STEPS, runner.vocab_size)
    for width in range(1, STEPS + 1):
        assert np.array_equal(runner.verify(2, texts.next[1][:width], LENGTHS[1]), wanted[:width])
    assert np.abs(wanted - np.stack(texts.alone[1][0][1:])).max() < 0.5
    texts.step({2: 1}, 0, [2])


# One runner is enough


@pytest.fixture(scope="module")
def small(build_bundle: Build) -> Path:
    """A random model with room for 64 tokens."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=31)
    return build_bundle(model, precision="fp32", target="cpu")


def test_logits_are_a_sessions(demo_bundles: dict[str, Path], demo_sessions: dict[str, Session]) -> None:
    session = demo_sessions["fp32"].runner
    texts = Texts(opened(demo_bundles["fp32"]))
    for text, (rows, _) in enumerate(texts.alone):
        session.rewind()
        wanted = [session.prefill(texts.prompts[text]).copy()]
        wanted += [session.decode(token).copy() for token in texts.next[text]]
        assert np.abs(np.stack(rows) - np.stack(wanted)).max() <= 2e-5


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


@pytest.mark.parametrize("make", [HostPool, lambda *sizes: DevicePool(*sizes, cuda.Memory(cuda.Cuda(FakeCuda())))])
def test_places_exchange_all_their_rows(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_AT_ONCE", 2)
    held = make(CacheSpec(layers=2, kv_heads=3, head_dim=4, dtype="bfloat16", max_seq_len=9), 9, 3)
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, held.block_shape(9), np.uint8) for _ in range(3)]
    for rows, others in ((5, 7), (7, 4), (3, 0), (0, 8), (0, 0), (9, 9)):
        for place, block in enumerate(blocks):
            held.write(place, 0, block)
        held.exchange(0, 2, rows, others)
        assert np.array_equal(held.read(0, 0, others), blocks[2][:, :, :others])
        assert np.array_equal(held.read(2, 0, rows), blocks[0][:, :, :rows])
        assert np.array_equal(held.read(1, 0, 9), blocks[1])


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


def test_no_memory_for_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before it's touched: the system would grant more than it has, and kill the process later."""
    spec = CacheSpec(layers=40, kv_heads=2, head_dim=128, dtype="float32", max_seq_len=32768)
    monkeypatch.setattr(pool, "memory_bytes", lambda: (32_000_000_000, 7_000_000_000))
    with pytest.raises(UserError) as error:
        HostPool(spec, 32768, 9)
    assert str(error.value) == (
        "the caches take 24.16 GB: 9 sequences of 32768 tokens of 81920 bytes (40 layers, 2 heads of 128 in float32); "
        "they cannot be had (7.00 GB are free): ask for fewer slots or a smaller max_seq_len"
    )
    monkeypatch.setattr(pool, "memory_bytes", lambda: (1 << 62, 1 << 62))  # as a system that promises anything
    with pytest.raises(UserError, match=r"256 sequences of 1125899906842624 tokens .* cannot be had \("):
        HostPool(spec, 1 << 50, 256)
    api = FakeCuda()
    api.failing["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=r"they cannot be had \(caches: .* cudaErrorMemoryAllocation"):
        DevicePool(spec, 8, 2, cuda.Memory(cuda.Cuda(api)))
