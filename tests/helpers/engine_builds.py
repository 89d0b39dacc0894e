"""Engine builds without a display, for the tests."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from glm4export.tensorrt.engines import EngineBuilder, EngineOptions, Show, plan

LAYERS = 4  # of the embedded model


def silent(name: str) -> Any:
    return nullcontext(lambda phase: None)


def builder(show: Show = silent, **options: Any) -> EngineBuilder:
    """For compute capability 8.9, unless ``options`` (EngineOptions') say otherwise."""
    return EngineBuilder(plan(EngineOptions(**{"compute_capabilities": ("8.9",), **options})), show)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
