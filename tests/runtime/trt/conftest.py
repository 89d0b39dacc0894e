"""A bundle with an "engine", and stand-ins for TensorRT and CUDA in their place."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glm4runtime import Session, load
from glm4runtime.backends import trt_choice
from glm4runtime.contract import WEIGHTS, FileSpec, Manifest, sha256_of
from glm4runtime.contract.engine_spec import EngineSpec, Profile, engine_stem
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.fake_tensorrt import FakeTensorRT

ONE = (Profile("step", (1, 1, 4), (1, 1, 32), (1, 1, 16)),)
Rig = tuple[FakeCuda, FakeTensorRT]


@pytest.fixture(scope="session")
def bundle(build_bundle: Build) -> Path:
    """A random model for TensorRT, without an engine."""
    return build_bundle(checkpoints.random_model(eos_token_id=[1], vocab_size=31), precision="fp32", target="tensorrt")


@pytest.fixture(scope="session")
def reference(bundle: Path) -> Session:
    return load(bundle, provider="cpu")


@pytest.fixture
def engine(bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the bundle with an "engine" in it: the name of the bundle's step graph, and a sidecar."""

    def add(profiles: tuple[Profile, ...] = ONE, *, listed: bool = True, **changes: Any) -> Path:
        folder = tmp_path / "bundle"
        if not folder.exists():
            shutil.copytree(bundle, folder, copy_function=os.link)
        manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"), "manifest.json")
        text = str(bundle / "step.onnx")
        spec = EngineSpec(
            "tensorrt-rtx", "1.7.1", "8.9", "fp32", "standard", False, profiles,
            manifest.engine_graph_sha256, manifest.files[WEIGHTS].sha256, len(text), "",
        )  # fmt: skip
        spec = dataclasses.replace(spec, **changes)
        stem = folder / engine_stem(spec.flavour, spec.compute_capability)
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".engine").write_text(text)
        spec = dataclasses.replace(spec, sha256=sha256_of(stem.with_suffix(".engine")))
        stem.with_suffix(".json").write_text(spec.to_json())
        files = {}
        if listed:
            files = {path.relative_to(folder).as_posix(): FileSpec(path.stat().st_size, sha256_of(path))
                     for path in (stem.with_suffix(".engine"), stem.with_suffix(".json"))}  # fmt: skip
        kept = {name: file for name, file in manifest.files.items() if listed or not name.startswith("engines/")}
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text(dataclasses.replace(manifest, files={**kept, **files}).to_json())
        return folder

    return add


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Puts the stand-ins into the place of TensorRT and CUDA; no rule of theirs may be broken, to the very end."""
    made: list[FakeCuda] = []

    def put(profiles: tuple[Profile, ...] = ONE, *, flavour: str = "tensorrt_rtx") -> Rig:
        made.append(cuda := FakeCuda())
        module = FakeTensorRT(cuda, profiles, flavour=flavour)
        monkeypatch.setitem(sys.modules, flavour, module)
        monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        bindings = types.ModuleType("cuda.bindings")
        bindings.runtime = cuda  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setattr(trt_choice, "gpu_capability", lambda: "8.9")
        return cuda, module

    yield put
    gc.collect()
    assert not [rule for cuda in made for rule in cuda.broken_rules]
