"""Small bundles, and ``bench`` over them on a machine whose limits are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glm4export import cli
from glm4export.bench import measure as bench
from glm4export.bench.limits import Limits
from tests.conftest import Build
from tests.helpers import checkpoints

LIMITS = Limits(read_bytes_per_second=1e10, int8_ops_per_second=2e11, fp32_ops_per_second=1e11)


@pytest.fixture(scope="session")
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
