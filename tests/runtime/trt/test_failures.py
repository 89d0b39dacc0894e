"""Calls of CUDA and TensorRT that fail are told by the call's name."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4export import cli
from glm4runtime import UserError, load
from glm4runtime.backends.cuda import Cuda, open_cuda
from glm4runtime.backends.trt_module import import_flavour
from tests.helpers.fake_cuda import cudaError_t
from tests.runtime.trt.conftest import Rig


def test_no_device(engine: Callable[..., Path], rig: Callable[..., Rig], capsys: pytest.CaptureFixture[str]) -> None:
    cuda, _ = rig()
    cuda.failing["cudaGetDeviceCount"] = cudaError_t.cudaErrorNoDevice
    message = "no CUDA device: cudaGetDeviceCount: cudaErrorNoDevice (as the driver puts it); an NVIDIA GPU"
    assert cli.main(["generate", str(engine()), "--raw", "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "no engine that runs here: " in error and message in error and error.count("\n") == 1
    assert "`--provider cpu` runs the same graph in ONNX Runtime, without a GPU" in error


@pytest.mark.parametrize("failing", ["cudaStreamCreateWithFlags", "cudaMemset", "cudaMallocHost", "cudaMemcpy"])
def test_a_call_that_fails_at_load(failing: str, engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    cuda.failing[failing] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match=f"{failing} failed: cudaErrorInvalidValue"):
        load(engine())
    gc.collect()
    assert not cuda.memory["device"] and not cuda.memory["pinned"]


def test_a_device_that_is_full(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    cuda.failing["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=r"the cache: 0.00 GB on the device: cudaMalloc failed: cudaErrorMem.*; free"):
        load(engine())


@pytest.mark.parametrize("failing", ["cudaGraphLaunch", "cudaStreamSynchronize", "cudaMemset2DAsync"])
def test_a_call_that_fails_in_the_loop(failing: str, engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    cuda, _ = rig()
    runner = load(engine()).runner
    runner.prefill([5, 6])
    cuda.failing[failing] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match=f"^{failing} failed: cudaErrorInvalidValue"):
        runner.decode(7)
    assert runner.length == 2


def test_an_engine_that_will_not_run(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    _, module = rig()
    module.broken = True
    with pytest.raises(UserError, match="execute_async_v3 failed"):
        load(engine())


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Path]) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UserError, match=r"cuda-python cannot be imported .*; pip install '\.\[tensorrt\]'"):
        open_cuda("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match=r"tensorrt_rtx is not installed; pip install '\.\[tensorrt-rtx\]'"):
        import_flavour("tensorrt-rtx")
    with pytest.raises(UserError, match=r"no engine that runs here: tensorrt_rtx is not installed; .*; `--provider"):
        load(engine())


def test_a_device_count_of_none() -> None:
    api = types.SimpleNamespace(cudaGetDeviceCount=lambda: (cudaError_t.cudaSuccess, 0))
    with pytest.raises(UserError, match="no CUDA device: cudaGetDeviceCount: none found"):
        Cuda(api)
