"""The comparison of many requests at once: its numbers, and its report over what the engine measures of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.demo import DEMO

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from compare_serving import measured  # noqa: E402
from peers.serving import Times  # noqa: E402


def test_numbers_of_a_run() -> None:
    """Two answers of three tokens, in half a second."""
    answers = [{"after": [0.1, 0.2, 0.3]}, {"after": [0.3, 0.34, 0.38]}]
    found = measured({"seconds": 0.5, "answers": answers}, 2)
    assert found["2 at once (tok/s)"] == 12
    assert found["first token of 2, p50 (ms)"] == pytest.approx(200)
    assert found["first token of 2, p99 (ms)"] == pytest.approx(298)
    assert found["next token of 2, p50 (ms)"] == pytest.approx(70)


def test_tokens_that_come_together_share_the_wait() -> None:
    times = Times(began=0.0)
    times.came(5)
    times.came(6, 7)
    first, second, third = times.at
    assert second - first == pytest.approx(third - second, abs=1e-9)  # since the machine's start, in floats
    assert times.as_json() == {"after": [first, second, third], "tokens": [5, 6, 7]}


def test_report(demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    page, numbers, bundle = tmp_path / "report.md", tmp_path / "numbers.json", demo_bundles["fp32"]
    roots = os.pathsep.join(map(str, (ROOT, ROOT / "graphs", ROOT / "runtime")))
    command = [sys.executable, ROOT / "tools" / "compare_serving.py", DEMO, "--bundle", bundle, "--peers", "nobody:x"]
    command += ["--requests", "5", "--at-once", "2", "--alone", "2", "--lengths", "3", "9", "--new-tokens", "4"]
    command += ["--rounds", "2", "--threads", "1", "--report", page, "--json", numbers, "--work", tmp_path / "work"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unknown peer 'nobody:x'" in done.stderr

    found, report = json.loads(numbers.read_text()), page.read_text()
    free, invariant = found["peers"]
    assert (free, invariant) == (f"glm4export:{bundle}", f"glm4export-invariant:{bundle}")
    assert found["alike"] == {free: 1.0, invariant: 1.0}
    assert len(found["samples"]) == 11
    assert all(len(rounds) == 2 and min(rounds) > 0 for row in found["samples"].values() for rounds in row.values())
    many, one, speedup = (row[free] for name, row in found["samples"].items() if "at once" in name)
    np.testing.assert_allclose(speedup, np.divide(many, one))
    assert "| 2 at once over 1 |" in report and f"| {bundle.name} invariant |" in report
    assert "invariant=True" in report and "Medians of 2 rounds of 5 requests" in report
