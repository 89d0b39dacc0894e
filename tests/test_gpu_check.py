"""``tools/gpu_check.py`` where there is no GPU: what a CPU can is run, the rest is named with the reason."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_check

    yield gpu_check
    for name in [name for name in sys.modules if name.split(".")[0] in ("gpu_check", "gpu_runs", "plugin_runs")]:
        del sys.modules[name]


def arguments(output: Path, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(output=output, model=None, cpu=True, precision=None, minutes=10.0, **given)


def test_without_a_gpu(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_runs.bundles as bundles
    import gpu_runs.choices as choices

    asked: list[Any] = []

    def cuda_bundles(model: Any, folder: Path, precisions: Any, **how: Any) -> Iterator[dict[str, Any]]:
        asked.append((list(precisions), how))
        yield {"case": "one", "ok": True, "mean_kl": 1.25e-7}
        yield {"case": "two", "ok": False, "error": "UserError: no"}

    monkeypatch.setattr(bundles, "cuda_bundles", cuda_bundles)
    monkeypatch.setattr(choices, "top_logits", lambda *_: iter([{"case": "three", "ok": True}]))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "-o", str(tmp_path), "--cpu"])
    assert tool.main() == 1
    assert asked == [(["fp16", "int4", "int8"], {"provider": "cpu", "peak": None})]
    page = (tmp_path / "report.md").read_text()
    assert "## top logits: 1 of 1 right" in page
    assert "## cuda bundles: 1 of 2 right" in page and "mean_kl 1.25e-07" in page and "error UserError: no" in page
    for step in ("kernels", "decoding", "prefill", "engines", "cuda graphs", "fused int4", "transformers"):
        assert f"- {step}: --cpu was given" in page
    assert "- cuda bundle, bf16: onnxruntime's CPU kernels take no bf16" in page
    assert (tmp_path / "report.json").is_file()


def test_where_only_torch_and_triton_are(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "gpu_runs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "glm4export.verification.verify", None)
    skipped = dict(tool.steps(arguments(tmp_path)))
    assert "is not installed: only kernels are checked" in skipped["bundles"]


def test_a_step_that_ends_early_is_told_and_the_next_one_runs(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"case": "first", "ok": True}
        raise RuntimeError("capture failed")

    monkeypatch.setattr(tool, "steps", lambda _: iter([("bad", broken()), ("good", iter([{"case": "second"}]))]))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "-o", str(tmp_path), "--cpu"])
    assert tool.main() == 1
    page = (tmp_path / "report.md").read_text()
    assert "## bad: 1 of 2 right" in page and "the rest of bad, ok False, error RuntimeError: capture failed" in page
    assert "## good: 1 of 1 right" in page


def test_nothing_is_begun_when_time_is_over(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "steps", lambda _: iter([("slow", iter([{"case": "first"}, {"case": "never"}]))]))
    given = arguments(tmp_path)
    given.minutes = 0.0
    report = tool.run(given)
    assert report["results"] == {"slow": [{"case": "first"}]}
    assert report["skipped"] == {"the rest of slow": "0 minutes were over"}
