from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4ForCausalLM

from glm4export.build.build import build
from glm4export.build.options import BuildOptions
from glm4export.sources.checkpoint import Location, locate
from glm4export.tensorrt.flavour import TENSORRT_RTX
from glm4export.tensorrt.worker import Job
from glm4runtime import Session, load
from tests.helpers import checkpoints
from tests.helpers.engine_builds import LAYERS
from tests.helpers.heldout import HELDOUT
from tests.helpers.kernels import KERNELS
from tests.helpers.traces import kept_traces

Build = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored() -> None:
    """As they are under nohup and in a shell's background, and then in every process that a test starts."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest-xdist's workers in this run: the folder that theirs lie in."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def traces_are_kept(shared_folder: Path) -> Iterator[None]:
    with kept_traces(shared_folder / "traces"):
        yield


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
def kernel_bundles(build_bundle: Build, demo_bundles: dict[str, Path]) -> Callable[[str], Path]:
    """The embedded model by name of the kernels that compute it, :data:`tests.helpers.kernels.KERNELS`."""

    def build(name: str) -> Path:
        return demo_bundles[name] if name in demo_bundles else build_bundle(None, **{"target": "cpu", **KERNELS[name]})

    return functools.cache(build)


@pytest.fixture(scope="session")
def demo_sessions(demo_bundles: dict[str, Path]) -> dict[str, Session]:
    return {precision: load(bundle) for precision, bundle in demo_bundles.items()}


@pytest.fixture(scope="session")
def tensorrt_bundles(build_bundle: Build) -> Callable[[str], Path]:
    """The embedded model for TensorRT by precision, without engines, each built once; not to be changed."""
    text = locate(None).folder / "heldout.txt"

    def build(precision: str) -> Path:
        calibrate = text if precision == "fp8" else None
        return build_bundle(None, precision=precision, target="tensorrt", max_seq_len=64, calibrate=calibrate)

    return functools.cache(build)


@pytest.fixture(scope="session")
def int8_cache_plugin(build_bundle: Build) -> Path:
    """The embedded model in fp16 for TensorRT's plugin, with its int8 cache; not to be changed."""
    options = {"precision": "fp16", "attention": "plugin", "kv_cache": "int8", "calibrate": HELDOUT}
    return build_bundle(None, target="tensorrt", max_seq_len=64, **options)


@pytest.fixture
def bundle(tensorrt_bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    """The one in fp16, to do anything with."""
    return Path(shutil.copytree(tensorrt_bundles("fp16"), tmp_path / "bundle"))


@pytest.fixture
def job(bundle: Path) -> Job:
    """An engine of ``bundle`` that may be built."""
    return Job(
        flavour="tensorrt-rtx",
        compute_capability="8.9",
        graph=str(bundle / "step.onnx"),
        engine=str(bundle / "new.engine"),
        attention="standard",
        layers=LAYERS,
        profiles=TENSORRT_RTX.profiles(chunk=64),
        optimization_level=None,
        workspace=None,
        timing_cache=None,
        version_compatible=False,
        weight_streaming=False,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        if shutil.which("mount") is None:
            pytest.skip("no mount command")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small file system is not permitted here")
        return disk

    try:
        yield mount
    finally:
        if disk.is_mount():
            subprocess.run(["umount", disk], capture_output=True)
