"""``fake_tensorrt.py`` and ``fake_cuda.py`` have no name that the real packages lack: what tests called exists."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from glm4runtime.backends.cuda import Cuda
from glm4runtime.backends.trt_engine import read_engine
from glm4runtime.backends.trt_module import error_log, import_flavour, version_of
from glm4runtime.contract import BundleError, UserError
from tests.helpers import fake_cuda, fake_tensorrt
from tests.helpers.fake_cuda import FakeCuda


def public(thing: Any) -> list[str]:
    return [name for name in vars(thing) if not name.startswith("_")]


def test_tensorrt_rtx_has_every_name() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for name in ("IExecutionContext", "ICudaEngine", "IRuntimeConfig"):
        for member in public(getattr(fake_tensorrt, name)):
            assert hasattr(getattr(real, name), member), f"{name}.{member}"
    assert hasattr(real.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(real.Runtime, "deserialize_cuda_engine")
    assert "Default: False" in real.Runtime.__doc__.split("engine_host_code_allowed")[1].split(":ivar")[0]
    assert "streamable_weights_size (default)" in real.ICudaEngine.__doc__
    assert "set the returned budget" in real.ICudaEngine.get_weight_streaming_automatic_budget.__doc__
    for name in ("Severity", "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        theirs = real.ILogger.Severity if name == "Severity" else getattr(real, name)
        for member in getattr(fake_tensorrt, name):
            assert int(theirs.__members__[member.name]) == member.value
    arguments = {
        "set_input_shape": ("name", "shape: tuple"),
        "set_tensor_address": ("name", "memory"),
        "set_optimization_profile_async": ("profile_index", "stream_handle"),
        "set_device_memory": ("memory", "size"),
        "execute_async_v3": ("stream_handle",),
        "is_stream_capturable": ("stream",),
    }
    for name, wanted in arguments.items():
        signature = getattr(real.IExecutionContext, name).__doc__
        assert all(argument in signature for argument in wanted), signature
    assert "strategy: " in real.ICudaEngine.create_execution_context.__doc__
    assert "runtime_config: " in real.ICudaEngine.create_execution_context.__doc__


def test_tensorrt_rtx_tells_why_it_reads_no_engine(tmp_path: Path) -> None:
    """The real package, as far as it goes without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    module = import_flavour("tensorrt-rtx")
    assert version_of(module)[0].isdecimal()
    log = error_log(module)
    path = tmp_path / "a.engine"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(BundleError, match=r"a\.engine: deserialize_cuda_engine failed: IRuntime.*magicTag.*; build"):
        read_engine(module.Runtime(log), path, log)


def test_cuda_bindings_has_every_call_with_as_many_arguments() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for name, fake in vars(FakeCuda).items():
        if name.startswith("_cuda"):
            theirs = inspect.signature(getattr(real, name[1:])).parameters
            assert len(theirs) == len(inspect.signature(fake).parameters) - 1, name
    for name in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        for member in getattr(fake_cuda, name):
            assert int(getattr(getattr(real, name), member.name)) == member.value
    assert real.cudaStreamNonBlocking == FakeCuda.cudaStreamNonBlocking


def test_without_a_device_every_call_takes_its_arguments_and_says_so() -> None:
    """Arguments of the types that ``trt.py`` passes are converted before the driver is found missing."""
    cuda = pytest.importorskip("cuda.bindings.runtime")
    if int(cuda.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a device, and these calls are not meant to succeed")
    with pytest.raises(UserError, match=r"no CUDA device: cudaGetDeviceCount: cudaError\w+ \(.+\); an NVIDIA GPU"):
        Cuda(cuda)
    stream, graph, replay, kind = (
        cuda.cudaStream_t(0),
        cuda.cudaGraph_t(0),
        cuda.cudaGraphExec_t(0),
        cuda.cudaMemcpyKind,
    )
    calls: dict[str, tuple[Any, ...]] = {
        "cudaSetDevice": (0,),
        "cudaMalloc": (16,),
        "cudaMallocHost": (16,),
        "cudaMemset": (256, 0, 16),
        "cudaMemcpy": (256, 512, 16, kind.cudaMemcpyHostToDevice),
        "cudaMemcpy2D": (256, 32, 512, 64, 16, 2, kind.cudaMemcpyDeviceToDevice),
        "cudaMemcpyAsync": (256, 512, 16, kind.cudaMemcpyDeviceToHost, stream),
        "cudaMemset2DAsync": (256, 17, 1, 1, 1, stream),
        "cudaStreamCreateWithFlags": (cuda.cudaStreamNonBlocking,),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamBeginCapture": (stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        "cudaStreamEndCapture": (stream,),
        "cudaGraphInstantiate": (graph, 0),
        "cudaGraphLaunch": (replay, stream),
        "cudaDeviceSynchronize": (),
        "cudaFree": (256,),
        "cudaFreeHost": (256,),
        "cudaStreamDestroy": (stream,),
        "cudaGraphDestroy": (graph,),
        "cudaGraphExecDestroy": (replay,),
    }
    told = {"cudaGetDeviceCount", "cudaGetErrorName", "cudaGetErrorString"}
    assert {name[1:] for name in vars(FakeCuda) if name.startswith("_cuda")} - told == set(calls)
    for name, arguments in calls.items():
        assert int(getattr(cuda, name)(*arguments)[0]), name
