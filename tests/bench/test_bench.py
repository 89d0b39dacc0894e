"""``glm4export bench``: figures that follow from one another, plots, mistakes; never how fast this machine is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from glm4export import cli, machine
from glm4export.bench import kernels, plot
from glm4export.bench import limits as bench_limits
from glm4export.bench import measure as bench
from glm4export.bench import report as bench_report
from glm4export.bench.kernels import KernelSpeeds
from glm4export.bench.limits import Limits
from glm4export.bench.workload import Workload, linear_weights, workload
from glm4runtime import BundleError, load
from glm4runtime.backends import ort as ort_runner
from glm4runtime.backends.matmul_model import int4_model, matmul_model
from glm4runtime.contract import DECODE, PREFILL, read_manifest
from glm4runtime.contract.onnxfile import read_graph
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.processes import PREFIX, WITHOUT, python

LIMITS = Limits(read_bytes_per_second=1e10, int8_ops_per_second=2e11, fp32_ops_per_second=1e11)
QUICK = ["--repeats", "3", "--steps", "4", "--prefill", "24,8", "--decode-context", "16,4", "--batch", "3,1"]


@pytest.fixture(scope="module")
def bundles(build_bundle: Build) -> dict[str, Path]:
    model = checkpoints.random_model()
    return {name: build_bundle(model, precision=name, target="cpu") for name in ("fp32", "fp16", "int4")}


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that measuring the machine takes."""
    monkeypatch.setattr(bench, "measure_limits", lambda: LIMITS)


@pytest.fixture
def run(limits: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(bundle: Path, *argv: object, status: int = 0) -> str:
        assert cli.main(["bench", str(bundle), *map(str, argv)]) == status
        captured = capsys.readouterr()
        assert (captured.out if status else captured.err) == ""
        return captured.err if status else captured.out

    return run


def work_of(bundle: Path, provider: str = "cpu", chunk: int = 512) -> Workload:
    return workload(bundle, read_manifest(bundle), provider=provider, chunk=chunk)


# figures


def test_json(bundles: dict[str, Path], run: Callable[..., str]) -> None:
    facts = json.loads(run(bundles["fp32"], *QUICK, "--threads", 1, "--json"))
    assert (facts["precision"], facts["provider"], facts["threads"], facts["max_seq_len"]) == ("fp32", "cpu", 1, 64)
    assert facts["plan"] == {"prefill": [8, 24], "contexts": [4, 16], "batches": [1, 3], "steps": 4, "repeats": 3}
    assert facts["onnxruntime"] == ort.__version__
    assert facts["peak_rss_bytes"] >= facts["pss_bytes"] > 1e6
    assert facts["machine"]["memory"] >= facts["machine"]["memory_available"] > 0
    assert [entry["tokens"] for entry in facts["prefill"]] == [8, 24]
    assert [(entry["batch"], entry["context"]) for entry in facts["decode"]] == [(1, 4), (1, 16), (3, 4)]
    for entry in (*facts["prefill"], *facts["decode"]):
        for spread in (value for value in entry.values() if isinstance(value, dict)):
            assert len(spread["runs"]) == 3
            assert spread["low"] == min(spread["runs"]) and spread["high"] == max(spread["runs"])
            assert spread["low"] <= spread["median"] <= spread["high"] and spread["low"] > 0


def test_figures_follow_from_one_another(bundles: dict[str, Path], run: Callable[..., str]) -> None:
    facts = json.loads(run(bundles["int4"], *QUICK, "--json"))
    work = facts["workload"]
    for entry in facts["prefill"]:
        seconds = entry["seconds"]["median"]
        assert entry["tokens_per_second"]["runs"] == [entry["tokens"] / run for run in entry["seconds"]["runs"]]
        pairs = zip(entry["first_token_seconds"]["runs"], entry["seconds"]["runs"], strict=True)
        assert all(first > ready for first, ready in pairs)
        assert entry["ops"] == 2 * (entry["tokens"] * work["layer_weights"] + work["head_weights"])
        assert entry["arithmetic_percent"] == pytest.approx(100 * entry["ops"] / seconds / LIMITS.int8_ops_per_second)
    for entry in facts["decode"]:
        seconds, batch = entry["seconds_per_step"]["median"], entry["batch"]
        assert entry["tokens_per_second"]["runs"] == [batch / run for run in entry["seconds_per_step"]["runs"]]
        cached = batch * entry["context"] * work["cache_bytes_per_token"]
        weights = work[entry["graph"]]  # of several sequences, the graph that was faster
        assert entry["bytes"] == weights["whole"] + batch * weights["per_token"] + cached
        percent = 100 * entry["bytes"] / seconds / LIMITS.read_bytes_per_second
        assert entry["bandwidth_percent"] == pytest.approx(percent)


def test_table(bundles: dict[str, Path], run: Callable[..., str]) -> None:
    lines = run(bundles["fp32"], *QUICK).splitlines()
    assert lines[0].startswith(
        f"{bundles['fp32']}: fp32 with a float32 cache on cpu, {machine.cores()} cores of {machine.cpu_name()}"
    )
    first = [line.split()[0] for line in lines if line]
    assert {"8", "24"} <= set(first)
    assert [line.split()[:3] for line in lines if "×" in line][1:] == [["1", "×", n] for n in ("4", "16")] + [
        ["3", "×", "4"]
    ]
    assert "limits   10.0 GB/s read, 200 GOP/s int8, 100 GOP/s fp32, measured with all cores" in lines


def test_a_busy_machine_is_told(bundles: dict[str, Path], limits: None) -> None:
    what = bench.plan(64, prefill=[8], contexts=[4], batches=[1], steps=1, repeats=1)
    report = bench.bench(load(bundles["fp32"]), what, provider="cpu", threads=0)
    assert "noisy" not in bench_report.table(report)
    uneven = replace(report.decode[0], seconds_per_step=bench_report.Spread.of([3.0, 1.0, 2.0]))
    text = bench_report.table(replace(report, decode=(uneven,)))
    assert "noisy: runs of the same work took up to 3.0x as long as others" in text


def test_without_limits_of_the_device(bundles: dict[str, Path]) -> None:
    session = load(bundles["fp32"])
    what = bench.plan(64, prefill=[8], contexts=[4], batches=[1], steps=1, repeats=1)
    report = bench.bench(session, what, provider="cuda", threads=0)
    assert report.limits is None and report.prefill[0].arithmetic_percent is report.decode[0].bandwidth_percent is None
    assert "limits   measured on cpu only, not on cuda" in bench_report.table(report)


def test_usual_lengths_as_far_as_they_fit() -> None:
    assert bench.plan(64).prefill == (32, 64)
    assert bench.plan(64).contexts == (16, 32)
    assert bench.plan(40).contexts == (8,)
    assert bench.plan(10_000) == bench_report.Plan(bench.PROMPTS, bench.CONTEXTS, bench.BATCHES, 32, 5)


# what is read and computed


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


# plots


@pytest.mark.parametrize("name", ["a.png", "a.SVG"])
def test_plot(name: str, bundles: dict[str, Path], run: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / name
    run(bundles["fp32"], *QUICK, "--plot", path)
    if name.endswith("png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        return
    assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    for label in ("Roofline", "arithmetic intensity", "memory, 10 GB/s", "int8 matmul, 200 GOP/s", "context [tokens]"):
        assert f"<!-- {label}" in text


def test_plot_without_limits(bundles: dict[str, Path], tmp_path: Path) -> None:
    what = bench.plan(64, prefill=[8], contexts=[4], batches=[1], steps=1, repeats=1)
    report = bench.bench(load(bundles["fp32"]), what, provider="cuda", threads=0)
    plot.write(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


# mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefill", "8,65"], "--prefill 65: the cache holds 64 tokens; ask for at most 64, or build the bundle"),
        (["--decode-context", "60"], "--decode-context 60: the cache holds 64 tokens and 32 of them are for --steps; "
                                     "ask for at most 32, or"),
        (["--max-seq-len", "20", "--prefill", "24", "--steps", "4"], "--prefill 24: the cache holds 20 tokens; ask"),
        (["--steps", "64"], "--steps 64: the cache holds 64 tokens; ask for fewer than that"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--repeats", "-1"], "--repeats -1: must be at least 1"),
        (["--prefill", "many"], "--prefill 'many': expected whole numbers of at least 1 with commas between, such as"),
        (["--prefill", ""], "--prefill '': expected whole numbers"),
        (["--decode-context", "0"], "--decode-context '0': expected whole numbers"),
        (["--batch", "1,,2"], "--batch '1,,2': expected whole numbers"),
        (["--batch=-1"], "--batch '-1': expected whole numbers"),
        (["--batch", "1000000000"], "--batch 1000000000: 1000000000 sequences of 48 tokens take "),
        (["--plot", "a.pdf"], "--plot a.pdf: unknown kind '.pdf'; end the name in .png or .svg"),
        (["--plot", "plot"], "--plot plot: unknown kind ''; end the name in .png or .svg"),
        (["--plot", "nowhere/a.png"], "--plot nowhere/a.png: no folder nowhere; make it first"),
        (["--threads", "-1"], "threads=-1 must be at least 0"),
    ],
)  # fmt: skip
def test_mistakes(argv: list[str], message: str, bundles: dict[str, Path], run: Callable[..., str]) -> None:
    found = run(bundles["fp32"], *argv, status=2)
    assert found.startswith(PREFIX + message) and found.count("\n") == 1


def test_no_bundle(run: Callable[..., str], tmp_path: Path) -> None:
    assert "not a bundle (no manifest.json)" in run(tmp_path, status=2)


RUNTIME_ONLY = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "tqdm", "transformers", "matplotlib"):
    sys.modules[name] = None
from glm4export.bench import limits, measure
measure.measure_limits = lambda: limits.Limits(1e10, 2e11, 1e11)
from glm4export.cli import main
sys.exit(main())
"""


def test_it_needs_the_runtime_only(bundles: dict[str, Path]) -> None:
    done = python(RUNTIME_ONLY, "bench", bundles["fp32"], *QUICK, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["precision"] == "fp32"


def test_plotting_needs_matplotlib(bundles: dict[str, Path], tmp_path: Path) -> None:
    done = python(WITHOUT, "matplotlib", "bench", bundles["fp32"], "--plot", tmp_path / "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    install = "pip install '.[bench]' in a clone of glm4export's repository"
    assert done.stderr == f"{PREFIX}matplotlib is not installed; {install}\n"


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    assert "example: glm4export bench " in capsys.readouterr().out


# ONNX files without onnx


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_graphs_are_read_as_onnx_reads_them(precision: str, name: str, bundles: dict[str, Path]) -> None:
    found = read_graph(bundles[precision] / name)
    graph = onnx.load(bundles[precision] / name, load_external_data=False).graph
    assert [(node.op, node.inputs) for node in found.nodes] == [(n.op_type, tuple(n.input)) for n in graph.node]
    integers = [{a.name: a.i for a in n.attribute if a.type == onnx.AttributeProto.INT} for n in graph.node]
    assert [node.integers for node in found.nodes] == integers
    assert {name: (t.dtype, t.shape) for name, t in found.stored.items()} == {
        t.name: (onnx.helper.tensor_dtype_to_np_dtype(t.data_type).name, tuple(t.dims)) for t in graph.initializer
    }
    for tensor in graph.initializer:
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        assert found.stored[tensor.name].nbytes == (lengths[0] if lengths else len(tensor.raw_data))


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 20, b"not an ONNX file", b"cut"])
def test_a_damaged_graph(data: bytes, bundles: dict[str, Path], tmp_path: Path) -> None:
    whole = (bundles["fp32"] / "decode.onnx").read_bytes()
    (tmp_path / "x.onnx").write_bytes(whole[: len(whole) // 2] if data == b"cut" else data)
    with pytest.raises(BundleError, match=r"x\.onnx: not a readable ONNX graph \(.*\); build the bundle again"):
        read_graph(tmp_path / "x.onnx")


@pytest.mark.parametrize(("given", "stored"), [(np.float32, np.float32), (np.uint8, np.int8)])
def test_matmul_model(given: Any, stored: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 100, (3, 200)).astype(given), rng.integers(-100, 100, (200, 5)).astype(stored)
    model = matmul_model(b)
    onnx.checker.check_model(onnx.load_from_string(model))
    (result,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"A": a})
    np.testing.assert_array_equal(result, a.astype(np.int64) @ b.astype(np.int64))


# the machine


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limits, "_SECONDS", 0.0)
    monkeypatch.setattr(bench_limits, "_ARRAY_BYTES", 1 << 24)
    monkeypatch.setattr(bench_limits, "_MATMUL", (64, 256, 256))
    measured = bench_limits.measure_limits()
    assert min(measured.read_bytes_per_second, measured.int8_ops_per_second, measured.fp32_ops_per_second) > 1e6
    assert measured.ops_per_second("int8") == measured.int8_ops_per_second


def test_this_machine() -> None:
    found = machine.describe()
    assert 0 < found.memory_available <= found.memory and found.cores >= 1 and found.cpu
    assert set(found.features) <= set(machine.FEATURES)


MEMINFO = "MemTotal:  8000 kB\nMemFree:  1000 kB\nMemAvailable:  6000 kB\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write files of a made-up /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")

    def write(**files: str) -> None:
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8000, 6000),
        ({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "1\n"}, 8000, 6000),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": "max\n", "cgroup/a/memory.max": "4096000\n",
          "cgroup/a/memory.current": "3072000\n", "cgroup/a/memory.stat": "anon 1\ninactive_file 1024000\n"},
         4000, 2000),
        ({"proc/self/cgroup": "0::/of/the/host\n", "cgroup/memory.max": "2048000\n",
          "cgroup/memory.current": "9999999\n"}, 2000, 0),
        ({"proc/self/cgroup": "4:cpu,memory:/x\n1:pids:/\n", "cgroup/memory/x/memory.limit_in_bytes": "1024000\n",
          "cgroup/memory/x/memory.usage_in_bytes": "512000\n",
          "cgroup/memory/x/memory.stat": "total_inactive_file 102400\n"}, 1000, 600),
        ({"proc/self/cgroup": "4:memory:/\n", "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
         8000, 6000),
    ],
)  # fmt: skip
def test_memory(files: dict[str, str], total: int, available: int, system: Callable[..., None]) -> None:
    system(**files)
    assert machine.memory_bytes() == (total * 1024, available * 1024)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "2:cpu,cpuacct:/\n", "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
          "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 1),
        ({"proc/self/cgroup": "2:cpu:/\n", "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)  # fmt: skip
def test_cores(files: dict[str, str], cores: int, system: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    system(**files)
    assert machine.cores() == cores


def test_cpu(system: Callable[..., None]) -> None:
    first = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n"
    system(**{"proc/cpuinfo": f"{first}\nprocessor\t: 1\nflags\t\t: fma\n"})
    assert (machine.cpu_name(), machine.cpu_features()) == ("Some CPU", ("avx2", "avx512_vnni"))
    system(**{"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n"})
    assert machine.cpu_features() == ("asimd", "asimddp")
    assert machine.cpu_name()


def test_kernel_speeds_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = {"int4": 3e11, "int8": 7e11}
    monkeypatch.setattr(kernels, "matmul_peak", measured.pop)
    assert kernels.kernel_speeds() == kernels.kernel_speeds() == KernelSpeeds(3e11, 7e11)
    (kept,) = tmp_path.rglob("*.json")
    assert KernelSpeeds(3e11, 7e11).rows_are_faster and not KernelSpeeds(3e11, 3.5e11).rows_are_faster
    for damage in ("", "[]", '{"int4": "x", "int8": 1}', '{"int4": 1}', '{"int4": 0, "int8": 1}'):
        kept.write_text(damage)
        measured |= {"int4": 1e11, "int8": 2e11}
        assert kernels.kernel_speeds() == KernelSpeeds(1e11, 2e11)
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("in the way")
    measured |= {"int4": 1e11, "int8": 2e11}
    assert kernels.kernel_speeds() == KernelSpeeds(1e11, 2e11)


def test_the_int4_kernel_multiplies() -> None:
    """Against numpy: 2 and -3 as 4-bit values around 8, in blocks of 32 with scales of their own."""
    packed = np.full((5, 2, 16), 0xAA, np.uint8)
    packed[:, 1] = 0x55
    scales = np.arange(1, 11, dtype=np.float32)
    model = int4_model(packed, scales)
    (found,) = ort.InferenceSession(model).run(None, {"A": np.ones((3, 64), np.float32)})
    wanted = 32 * (2 * scales[0::2] - 3 * scales[1::2])
    np.testing.assert_allclose(found, np.broadcast_to(wanted, (3, 5)), rtol=1e-3)
    onnx.checker.check_model(onnx.load_from_string(matmul_model(np.ones((4, 4), np.float32))))


@pytest.mark.parametrize(
    ("speeds", "argv", "prefill", "told"),
    [
        ((3e11, 7e11), ["--precision", "int4"], "int8", "auto: int8, 700 GOP/s against 300 of weights in blocks"),
        ((3e11, 3e11), ["--precision", "int4"], "int4", "since int8 has 300 GOP/s against 300 of weights in blocks"),
        ((3e11, 7e11), ["--precision", "fp32"], "fp32", "which has no others for prefill"),
    ],
)
def test_prefill_precision_auto(
    speeds: tuple[float, float],
    argv: list[str],
    prefill: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernels, "kernel_speeds", lambda: KernelSpeeds(*speeds))
    folder = checkpoints.save(checkpoints.random_model(), tmp_path / "checkpoint")
    out = tmp_path / "bundle"
    build = ["build", str(folder), "-o", str(out), "--target", "cpu", "--prefill-precision", "auto", *argv]
    assert cli.main(build) == 0
    assert told in capsys.readouterr().err
    operators = {node.op for node in read_graph(out / "prefill.onnx").nodes}
    assert ("MatMulIntegerToFloat" in operators) == (prefill == "int8")
