"""``glm4export bench``: figures that follow from one another, plots, mistakes; never how fast this machine is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import onnxruntime as ort
import pytest

from glm4export import cli, machine
from glm4export.bench import measure as bench
from glm4export.bench import plot
from glm4export.bench import report as bench_report
from glm4runtime import Session, load
from glm4runtime.backends.gpu_options import GpuOptions
from tests.bench.conftest import LIMITS
from tests.helpers.processes import PREFIX, WITHOUT, python

QUICK = ["--repeats", "3", "--steps", "4", "--prefill", "24,8", "--decode-context", "16,4", "--batch", "3,1"]


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


def test_over_several_devices(
    bundles: dict[str, Path], run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence by default, and more where they are asked for is refused."""

    def load_session(arguments: argparse.Namespace) -> Session:
        session = load(arguments.bundle, threads=1)
        monkeypatch.setattr(session.runner, "gpu", GpuOptions(0, None, (0, 1)))
        return session

    monkeypatch.setattr("glm4export.commands.bench.load_session", load_session)
    facts = json.loads(run(bundles["fp32"], *QUICK[:-2], "--json"))
    assert {entry["batch"] for entry in facts["decode"]} == {1}
    assert "--batch 3: stages on several devices are measured with one seq" in run(bundles["fp32"], *QUICK, status=2)


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
