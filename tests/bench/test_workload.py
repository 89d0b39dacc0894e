"""What a run reads and computes: bytes by the graph, operations by the linears, batches by either graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4export.bench import measure as bench
from glm4export.bench import report as bench_report
from glm4export.bench.workload import Workload, linear_weights, workload
from glm4runtime import load
from glm4runtime.backends import ort as ort_runner
from glm4runtime.contract import DECODE, PREFILL, read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints


def work_of(bundle: Path, provider: str = "cpu", chunk: int = 512) -> Workload:
    return workload(bundle, read_manifest(bundle), provider=provider, chunk=chunk)


def test_bytes_read_are_those_of_the_graph(bundles: dict[str, Path]) -> None:
    work = work_of(bundles["fp32"])
    config = checkpoints.SMALL
    row_of_embedding = 4 * config["hidden_size"]
    parameters = sum(4 * parameter.numel() for parameter in checkpoints.random_model().parameters())
    without_embedding = parameters - config["vocab_size"] * row_of_embedding
    assert 0 <= work.decode.whole - without_embedding < 100  # and a few constants of the shape arithmetic
    assert row_of_embedding < work.decode.per_token <= row_of_embedding + 2 * 4 * config["head_dim"]
    assert work.decode_bytes(3, 10) == work.decode.whole + 3 * (work.decode.per_token + 10 * work.cache_bytes_per_token)


def test_fp16_is_widened_on_a_cpu(bundles: dict[str, Path]) -> None:
    wide, narrow = work_of(bundles["fp16"]), work_of(bundles["fp16"], provider="cuda")
    assert wide.decode.whole == pytest.approx(work_of(bundles["fp32"]).decode.whole, rel=1e-3)
    assert narrow.decode.whole == pytest.approx(wide.decode.whole / 2, rel=1e-3)


def test_operations_are_those_of_the_linears(bundles: dict[str, Path]) -> None:
    layers, head = linear_weights(read_manifest(bundles["fp32"]).config)
    linears = {
        name: parameter.numel()
        for name, parameter in checkpoints.random_model().named_parameters()
        if name.endswith("proj.weight") or name == "lm_head.weight"
    }
    assert head == linears.pop("lm_head.weight")
    assert layers == sum(linears.values())
    work = work_of(bundles["fp32"], chunk=16)
    assert work.prefill_ops(40) == 2 * (40 * layers + 3 * head)  # three chunks, each with one row of logits
    weights = 3 * work.prefill.whole + 40 * work.prefill.per_token
    assert work.prefill_bytes(40) == weights + (16 + 32 + 40) * work.cache_bytes_per_token
    assert work.decode_ops(2) == 2 * 2 * (layers + head)
    assert work.prefill_arithmetic == work.decode_arithmetic == "fp32"
    assert work_of(bundles["int4"]).prefill_arithmetic == "int8"


@pytest.mark.parametrize("graph", ["decode", "prefill"])
def test_batches_compute_what_one_sequence_does(
    graph: str, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_runner, "graphs_to_open", lambda *_: (PREFILL, DECODE))
    session = load(bundles["fp32"])
    runner = session.runner
    for buffer in runner._cache._buffers.values():
        buffer.array.fill(1)
    runner.sequence.length = 5
    rows = bench.BatchDecoder(runner, 3, 8)
    rows.use(graph)
    rows.rewind(5)
    rows.step()
    first = rows._logits.array.copy()
    np.testing.assert_allclose(first, np.broadcast_to(runner.decode(0), first.shape), atol=1e-5)
    rows.step()
    np.testing.assert_allclose(
        rows._logits.array, np.broadcast_to(runner.decode(int(first[0].argmax())), first.shape), atol=1e-5
    )


def test_a_timed_prefill_computes_the_whole_prompt_every_time(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, widths = load(bundles["fp32"]), list[int]()
    right = session.runner._run_prompt
    monkeypatch.setattr(session.runner, "_run_prompt", lambda ids, *at: (widths.append(len(ids)), right(ids, *at))[1])
    bench._time_prefill(session, list(range(5, 25)), 2)
    assert widths == [20, 20, 20]


@pytest.mark.parametrize("faster", ["decode", "prefill"])
def test_batches_take_the_faster_graph(
    faster: str, build_bundle: Build, limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With formats of its own, prefill may be better at many rows; one sequence always takes the decode graph."""
    model = checkpoints.random_model()
    session = load(build_bundle(model, precision="int4", target="cpu", prefill_precision="int8"))
    names = {id(graph): name for name, graph in session.runner.graphs.items()}

    def time_steps(step: Any, rewind: Any, what: Any) -> list[float]:
        step_of = getattr(step, "__self__", None)
        graph = names[id(step_of._graph)] if isinstance(step_of, bench.BatchDecoder) else "decode"
        return [1.0 if graph == faster else 2.0] * what.repeats

    monkeypatch.setattr(bench, "_time_steps", time_steps)
    what = bench.plan(64, prefill=[8], contexts=[4], batches=[1, 3], steps=1, repeats=2)
    report = bench.bench(session, what, provider="cpu", threads=1)
    one, three = report.decode
    work = report.workload
    assert (one.batch, one.graph, three.batch, three.graph) == (1, "decode", 3, faster)
    assert three.seconds_per_step.median == 1.0
    assert three.bytes == work.decode_bytes(3, 4, faster) and work.decode_bytes(3, 4, "prefill") > one.bytes
    assert ("by the prefill graph" in bench_report.table(report)) == (faster == "prefill")
