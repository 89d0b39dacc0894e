"""Steps as CUDA graphs: the graph that they need, its parity on the CPU, and what a session does to have them captured.

CUDA itself is a stand-in over the host's memory, and ONNX Runtime's CPU provider runs the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from glm4export.build import build as build_module
from glm4export.build.options import BuildOptions
from glm4export.passes import pipeline as pipeline_module
from glm4export.passes.lower_attention_gqa import lower_attention_gqa
from glm4runtime import SamplingParams, UserError, load
from glm4runtime.backends import cuda_graph, ort_batch, providers, stages
from glm4runtime.backends import ort as ort_module
from glm4runtime.backends.cuda import Cuda
from glm4runtime.backends.held_row import HeldRow
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.backends.ort_session import open_session
from glm4runtime.backends.settings import Settings
from glm4runtime.contract import past_name, present_name, read_manifest
from glm4runtime.contract.onnxfile import read_graph
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.fake_cuda import FakeCuda, cudaError_t

MAX_SEQ = 48
PROMPT = list(range(5, 22))
# Where a node computes on the host, or its result is read there: what stands between a graph and its capture
HOST = {"Shape", "Size", "Range", "NonZero", "ReduceSum", "Squeeze", "Sub"}


@pytest.fixture(scope="module")
def bundle(build_bundle: Build) -> Path:
    return build_bundle(checkpoints.random_model(), precision="fp16", target="cuda", max_seq_len=MAX_SEQ)


@pytest.fixture(scope="module")
def wide(build_bundle: Build) -> Path:
    """In fp32, which no build for a GPU has: prefill takes lengths, decode a mask, over the same weights."""

    def lowering(**_: Any) -> Any:
        return lower_attention_gqa(take_lengths=lowering.graph == "prefill")

    def of_graph(options: BuildOptions, graph: str, scales: Any) -> Any:
        lowering.graph = graph
        yield from pipeline_module.pipeline(options, graph, scales)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "lower_attention_gqa", lowering)
        patch.setattr(build_module, "pipeline", of_graph)
        return build_bundle(checkpoints.random_model(), precision="fp32", target="cpu", max_seq_len=MAX_SEQ)


class Raw:
    """A graph in onnxruntime and its cache, without our runtime."""

    def __init__(self, bundle: Path, graph: str) -> None:
        cache = read_manifest(bundle).cache
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(bundle / f"{graph}.onnx", options)
        names = [(layer, part) for layer in range(cache.layers) for part in ("key", "value")]
        shape = (1, cache.kv_heads, MAX_SEQ, cache.head_dim)
        self.past = {past_name(*name): np.zeros(shape, cache.dtype) for name in names}
        self.outputs = ["logits", *(present_name(*name) for name in names)]

    def run(self, tokens: list[int], **feed: np.ndarray) -> np.ndarray:
        logits, *presents = self.session.run(self.outputs, {"input_ids": np.array([tokens]), **feed, **self.past})
        self.past = dict(zip(self.past, presents, strict=True))
        rows: np.ndarray = logits[0]
        return rows


def test_lengths_in_place_of_the_mask(wide: Path) -> None:
    """fp32: prompt, steps with the total held at the most, a draft; beside the graph that takes a mask."""
    masked, told, length = Raw(wide, "decode"), Raw(wide, "prefill"), 0
    for tokens in (PROMPT, [30], [31], [32, 33, 34], [35]):
        length += len(tokens)
        wanted = masked.run(tokens, attention_mask=np.ones((1, length), np.int64))
        total = MAX_SEQ if len(tokens) == 1 else length
        found = told.run(
            tokens,
            seqlens_k=np.array([length - 1], np.int32),
            total_sequence_length=np.array(total, np.int32),
            logit_rows=np.arange(len(tokens))[None],
        )
        assert np.abs(found - wanted).max() <= 2e-5, f"{len(tokens)} tokens behind {length - len(tokens)}"
    rows = {name: value[:, :, :length] for name, value in masked.past.items()}
    assert all(np.abs(told.past[name][:, :, :length] - value).max() <= 2e-5 for name, value in rows.items())


def test_nothing_computes_on_the_host(bundle: Path) -> None:
    """Nodes of a step; decode, for onnxruntime-genai, has what it had."""
    prefill, decode = (read_graph(bundle / f"{name}.onnx") for name in ("prefill", "decode"))
    assert [(spec.name, spec.dtype, spec.dims) for spec in prefill.inputs[:4]] == [
        ("input_ids", "int64", ("batch", "seq")),
        ("seqlens_k", "int32", ("batch",)),
        ("total_sequence_length", "int32", ()),
        ("logit_rows", "int64", ("batch", "rows")),
    ]
    assert not HOST & {node.op for node in prefill.nodes}
    assert [spec.name for spec in decode.inputs[:2]] == ["input_ids", "attention_mask"]
    assert {"Shape", "Squeeze", "ReduceSum"} <= {node.op for node in decode.nodes}
    readers = {node.op for node in prefill.nodes if {"seqlens_k", "total_sequence_length"} & set(node.inputs)}
    assert readers == {"GroupQueryAttention"}


class Recorder:
    """A session whose bindings and run options are noted."""

    def __init__(self, session: Any) -> None:
        self.session, self.runs = session, list[tuple[Any, str]]()
        self.bound: dict[int, list[tuple[Any, ...]]] = {}

    def io_binding(self) -> Any:
        binding, calls = self.session.io_binding(), list[tuple[Any, ...]]()
        self.bound[id(binding)] = calls
        for name in ("bind_input", "bind_output"):
            setattr(binding, name, partial(self._bind, calls, getattr(binding, name)))
        return binding

    @staticmethod
    def _bind(calls: list[tuple[Any, ...]], call: Any, *arguments: Any) -> None:
        calls.append(arguments)
        call(*arguments)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.runs.append((binding, options and options.get_run_config_entry("gpu_graph_id")))
        self.session.run_with_iobinding(binding, options)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU as it looks to us, on which ONNX Runtime's sessions are recorders."""
    state: dict[str, Any] = {"cuda": FakeCuda(), "options": None}

    def open_recorder(path: Path, provider: str, threads: int, *, options: Any, **_: Any) -> Recorder:
        state["options"] = (provider, dict(options))
        state["session"] = Recorder(open_session(path, "cpu", 1))
        return state["session"]  # type: ignore[no-any-return]

    monkeypatch.setattr(cuda_graph, "open_cuda", lambda extra: Cuda(state["cuda"]))
    monkeypatch.setattr(ort_module, "device_of", lambda provider: "cpu")
    monkeypatch.setattr(stages, "open_session", open_recorder)
    monkeypatch.setattr(providers, "_require_ready", lambda *_, **__: None)
    yield state


def test_a_session_has_its_steps_captured(bundle: Path, machine: dict[str, Any]) -> None:
    with load(bundle, provider="cpu", threads=1) as plain, load(bundle, cuda_graphs=True, device_id=1) as session:
        runner, theirs, recorder = session.runner, plain.runner, machine["session"]
        assert machine["options"][1] | {"device_id": "1", "enable_cuda_graph": "1"} == machine["options"][1]
        assert ("cudaSetDevice", 1) in machine["cuda"].calls
        limit = 2e-3 * np.abs(theirs.prefill(PROMPT)).max()
        theirs.rewind()
        assert np.abs(runner.prefill(PROMPT) - theirs.prefill(PROMPT)).max() <= limit
        for token in (30, 31):
            assert np.abs(runner.decode(token) - theirs.decode(token)).max() <= limit
        assert np.abs(runner.verify([32, 33]) - theirs.verify([32, 33])).max() <= limit
        for one in (runner, theirs):
            one.accept()
            one.rewind(one.length - 2)
        step = recorder.runs[-2][0]
        calls = list(recorder.bound[id(step)])
        for token in (40, 41, 42):
            assert np.abs(runner.decode(token) - theirs.decode(token)).max() <= limit
        assert recorder.bound[id(step)] == calls, "a captured step was bound again"
        kinds = [graph for _, graph in recorder.runs]
        assert [graph == "-1" for graph in kinds] == [True, False, False, True, False, False, False]
        assert len(set(kinds)) == 2 and all(binding is step for binding, graph in recorder.runs if graph != "-1")
        assert machine["cuda"].names().count("cudaMemcpy") == 5  # a row of logits behind each step
        row = runner.decode(43).copy()
        kept = runner.decode(44)
    assert not machine["cuda"].memory["device"], "the device's memory was not given back"
    assert np.isfinite(kept).all() and not np.array_equal(kept, row)


def test_steps_of_many_sequences_have_a_graph_each(bundle: Path, machine: dict[str, Any]) -> None:
    """For every number of rows one binding, bound once, and one graph; the granule is measured without any."""
    texts = {0: PROMPT, 1: [9, 8, 7], 2: list(range(60, 71))}
    settings = Settings(threads=1, prefill_chunk=32, cuda_graphs=True)
    runner = providers.open_batch_runner(bundle, read_manifest(bundle), settings, slots=3)
    recorder = machine["session"]
    assert machine["options"][1]["enable_cuda_graph"] == "1"
    starts = {slot: len(text) for slot, text in texts.items()}
    with load(bundle, provider="cpu", threads=1) as alone:
        added = dict.fromkeys(texts, ())
        for slot, text in texts.items():
            runner.prefill(slot, text, 0)
        assert {graph for _, graph in recorder.runs} == {"-1"}
        recorder.runs.clear()
        bound: dict[Any, int] = {}
        for slots in ([0, 1, 2], [2], [1, 0], [0], [2, 1, 0], [0, 2]):
            rows = runner.step(slots, [30] * len(slots), [starts[slot] for slot in slots])
            binding, _ = recorder.runs[-1]
            calls = len(recorder.bound[id(binding)])
            assert bound.setdefault(binding, calls) == calls, "a captured step was bound again"
            for slot, row in zip(slots, rows, strict=True):
                starts[slot] += 1
                added[slot] = (*added[slot], 30)
                alone.runner.rewind()
                wanted = alone.runner.prefill([*texts[slot], *added[slot]])
                assert np.abs(row - wanted).max() <= 2e-3 * np.abs(wanted).max()
        graphs = [graph for _, graph in recorder.runs]
        assert "-1" not in graphs and len(set(graphs)) == len(bound) == 3
        assert len(set(recorder.runs)) == 3, "a graph for two bindings"
        runner.verify(0, [31, 32], starts[0])
        assert recorder.runs[-1][1] == "-1"
    runner.close()
    assert not machine["cuda"].memory["device"]


def test_a_captured_steps_row_stays_on_the_device(build_bundle: Build, machine: dict[str, Any]) -> None:
    """One small copy a step, and the row's own only where it's asked for."""
    model = checkpoints.random_model()
    bundle = build_bundle(model, precision="fp16", target="cuda", max_seq_len=MAX_SEQ, output_top_logits=6)
    greedy, everything = SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=9, temperature=1.0, seed=1)
    with load(bundle, provider="cpu", threads=1) as plain, load(bundle, cuda_graphs=True) as session:
        cuda, vocab = machine["cuda"], session.manifest.vocab_size

        def copied() -> list[int]:
            sizes = [call[3] for call in cuda.calls if call[0] == "cudaMemcpy"]
            cuda.calls.clear()
            return sizes

        assert list(session.generate(PROMPT, greedy)) == list(plain.generate(PROMPT, greedy))
        assert copied() == [6 * 12 + 4] * 8
        assert list(session.generate(PROMPT, everything)) == list(plain.generate(PROMPT, everything))
        assert copied() == [4 * vocab] * 8
        row = session.runner.step(30, hold=True)
        assert isinstance(row, HeldRow)
        assert np.array_equal(row.fetch()[row.ids], row.values) and row.values[0] == row.fetch().max()
        guessed = session.generate([*PROMPT, *PROMPT], greedy, lookup=4)
        assert list(guessed) == list(plain.generate([*PROMPT, *PROMPT], greedy))
    assert not cuda.memory["device"]


def test_a_device_that_fails_is_told_in_a_line(bundle: Path, machine: dict[str, Any]) -> None:
    machine["cuda"].failing["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=r"logits of a step: 0.00 GB on the device: cudaMalloc failed: .*Allocation"):
        load(bundle, cuda_graphs=True)
    machine["cuda"].failing.clear()
    with load(bundle, cuda_graphs=True) as session:
        session.runner.prefill(PROMPT)
        machine["cuda"].failing["cudaMemcpy"] = cudaError_t.cudaErrorInvalidValue
        with pytest.raises(UserError, match="cudaMemcpy failed"):
            session.runner.decode(30)
        assert session.runner.length == len(PROMPT)


@pytest.mark.parametrize(
    ("value", "provider", "message"),
    [
        (1, None, "cuda_graphs=1 is not True or False"),
        (True, "cpu", "cuda_graphs is for bundles for cuda on cuda; this one is for cuda and runs on cpu; leave it"),
    ],
)
def test_where_they_are_refused(value: Any, provider: Any, message: str, bundle: Path) -> None:
    with pytest.raises(UserError) as error:
        load(bundle, provider=provider, cuda_graphs=value)
    assert message in str(error.value)


def test_bundles_that_cannot_be_captured(build_bundle: Build, bundle: Path, machine: dict[str, Any]) -> None:
    model = checkpoints.random_model()
    masked = build_bundle(model, precision="fp16", target="cpu")
    with pytest.raises(UserError, match="a mask that grows with every token; build the bundle with --target cuda"):
        load(masked, provider="cuda", cuda_graphs=True)
    slots = build_bundle(model, precision="fp16", target="cuda", lora_slots=1)
    with pytest.raises(UserError, match="cuda_graphs does not go with a bundle built with --lora-slots"):
        load(slots, cuda_graphs=True)


def test_several_sequences_by_lengths(bundle: Path) -> None:
    """The batch of a bundle for cuda, on a CPU: each sequence's logits as alone, whatever stands beside it."""
    texts = {0: PROMPT, 1: [9, 8, 7], 2: list(range(60, 71))}
    settings = Settings(provider="cpu", threads=1, prefill_chunk=32)
    runner = providers.open_batch_runner(bundle, read_manifest(bundle), settings, slots=3)
    assert isinstance(runner, ort_batch.OrtBatchRunner)
    with load(bundle, provider="cpu", threads=1) as alone:
        assert isinstance(alone.runner, OrtRunner)
        for slot, text in texts.items():
            runner.prefill(slot, text, 0)
        rows = runner.step([0, 1, 2], [30, 31, 32], [len(text) for text in texts.values()])
        for slot, text in texts.items():
            alone.runner.rewind()
            alone.runner.prefill(text)
            wanted = alone.runner.decode(30 + slot)
            assert np.abs(rows[slot] - wanted).max() <= 2e-3 * np.abs(wanted).max()
    runner.close()
