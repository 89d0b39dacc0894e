from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4ForCausalLM

from glm4export.checkpoint import Location, locate
from glm4export.compile import BuildOptions, build
from glm4runtime import Session, load

from . import checkpoints

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build_bundle(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a model or a checkpoint folder (None: the embedded one) into a new folder; options as BuildOptions'."""

    def run(model: Glm4ForCausalLM | Path | None, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("build")
        if isinstance(model, Glm4ForCausalLM):
            model = checkpoints.save(model, folder / "checkpoint")
        location = locate(None) if model is None else Location(model, {})
        silent = {"stage": lambda name: nullcontext(), "bar": lambda *size_and_name: nullcontext(lambda count: None)}
        build(location, folder / "bundle", BuildOptions(**options), **silent)
        return folder / "bundle"

    return run


@pytest.fixture(scope="session")
def demo_bundles(build_bundle: Build) -> dict[str, Path]:
    """The embedded model, built once in every precision of the cpu target."""
    return {precision: build_bundle(None, precision=precision, target="cpu") for precision in ("fp32", "fp16")}


@pytest.fixture(scope="session")
def demo_sessions(demo_bundles: dict[str, Path]) -> dict[str, Session]:
    return {precision: load(bundle) for precision, bundle in demo_bundles.items()}
