"""The comparison with other runtimes: its protocol, what it says of peers that can't run, and its report."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Build
from tests.helpers import checkpoints

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    "load (s)",
    "first prompt (s)",
    "resident (GiB)",
    "prefill 8 (tok/s)",
    "decode at 8 (tok/s)",
    "prefill 16 (tok/s)",
    "decode at 16 (tok/s)",
]


def compare(*arguments: str | Path, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    roots = [*paths, ROOT, ROOT / "graphs", ROOT / "runtime"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    command = [sys.executable, ROOT / "tools" / "compare_peers.py", *arguments, "--threads", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def table(page: str, first_cell: str) -> dict[str, list[str]]:
    """A table of the page by its rows' first cells, without the heading."""
    lines = page.split(f"\n| {first_cell} | ", 1)[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_report(build_bundle: Build, tmp_path: Path) -> None:
    checkpoint = checkpoints.save(checkpoints.random_model(), tmp_path / "checkpoint")
    bundle = build_bundle(checkpoint, precision="fp32", target="cpu")
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    peer, page, numbers = f"glm4export:{other}@small-pages", tmp_path / "report.md", tmp_path / "numbers.json"
    counts = ("--lengths", "8", "16", "--steps", "2", "--rounds", "3", "--loads", "1")
    done = compare(checkpoint, "--bundle", bundle, "--peers", peer, *counts, "--report", page, "--json", numbers)
    assert done.returncode == 0, done.stderr

    found = json.loads(numbers.read_text())
    report = page.read_text()
    ours, theirs = found["peers"]
    assert list(found["samples"]) == ROWS
    assert [len(row[ours]) for row in found["samples"].values()] == [1, 1, 1, 3, 3, 3, 3]
    assert found["alike"][theirs] > 0.9999

    medians = table(report, " | bundle")
    assert list(medians) == ROWS
    for name, cells in medians.items():
        row = found["samples"][name]
        assert [float(cell) for cell in cells] == pytest.approx(
            [statistics.median(row[ours]), statistics.median(row[theirs])], abs=0.006
        )
    ratios = table(report, "bundle over")
    assert list(ratios) == ROWS
    for name, (cell,) in ratios.items():
        row = found["samples"][name]
        wanted = [our / their for our, their in zip(row[ours], row[theirs], strict=True)]
        told = [float(number) for number in re.findall(r"[\d.]+", cell)]
        assert told == pytest.approx([statistics.median(wanted), min(wanted), max(wanted)], abs=0.006)

    settings = table(report, " | runtime")
    assert settings["bundle"][:2] == [f"glm4export 0.1.0 ({runtime(found, ours)}) bundle, fp32", "1 threads"]
    assert settings["other@small-pages"][2] == "0.00"  # GiB on huge pages
    assert found["machine"]["cpu"] in report and all(flag in report for flag in found["machine"]["flags"])
    assert f"--report {page}" in report


def runtime(found: dict[str, dict[str, dict[str, str]]], spec: str) -> str:
    return re.search(r"onnxruntime [\d.]+", found["peers"][spec]["name"])[0]  # type: ignore[index]


def test_missing_packages_are_named_with_what_takes_them(tmp_path: Path) -> None:
    """llama.cpp runs without torch, but writing a GGUF reads the checkpoint with it."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "gguf.py").write_text("")
    (stubs / "llama_cpp.py").write_text("def __getattr__(name):\n    return lambda *arguments: arguments[0]\n")
    (stubs / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    checkpoint = checkpoints.save(checkpoints.random_model(), tmp_path / "checkpoint")
    peers = ("--peers", "llama.cpp:BF16", "openvino:int4", "nobody:at-all")
    done = compare(checkpoint, *peers, "--work", tmp_path / "work", paths=(stubs,))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    gguf, openvino = tmp_path / "work" / "BF16.gguf", tmp_path / "work" / "openvino-int4"
    assert lines[0] == (
        f"llama.cpp:BF16: skipped: torch is not installed; only writing {gguf} takes it: pip install '.[compile]' gguf"
    )
    assert lines[1] in (
        "openvino:int4: skipped: openvino is not installed; pip install openvino, and optimum-intel to export",
        f"openvino:int4: skipped: optimum is not installed; only exporting to {openvino} takes it: "
        "pip install optimum-intel nncf (in a venv of its own, for --python openvino=VENV/bin/python)",
    )
    assert "unknown peer 'nobody:at-all'" in lines[2]
    assert lines[3:] == ["none of the peers can run here"]
