"""Starting CUDA in ONNX Runtime, and telling in one line why it won't.

Without these steps onnxruntime logs a page, and opens a graph for a GPU on the CPU. Never run on a GPU: docs/gpu.md.
"""

from __future__ import annotations

import ctypes
import io
from contextlib import redirect_stdout
from functools import cache

import numpy as np
import onnxruntime as ort

from glm4runtime.backends.gpu import gpu_capability
from glm4runtime.contract import UserError, installing

# What onnxruntime-gpu's provider "tensorrt" is linked with (readelf -d, release 1.31.1): of TensorRT 10, not 11
_TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")
_TENSORRT_EXTRA = "gpu-tensorrt"
_FAILED = "Failed to load "  # how a line of preload_dlls begins that matters


def start_cuda(name: str, device_id: int, *, tensorrt: bool = False) -> None:
    """Load what ONNX Runtime's CUDA provider needs and take a byte of the device, before any graph is opened.

    name: the provider's, for errors. tensorrt: load TensorRT's libraries too. Raises UserError with what is missing.
    """
    ort.set_default_logger_severity(3)  # as sessions have it: its warnings come as our errors
    if missing := _load_libraries():
        raise UserError(f"{name} could not start: {missing}; {installing('gpu')}")
    if tensorrt:
        _load_tensorrt(name)
    if gpu_capability() is None:
        raise UserError(f"{name} could not start: no NVIDIA GPU, or no driver (libcuda.so.1), was found")
    _take_as_asked()
    try:
        ort.OrtValue.ortvalue_from_shape_and_type((1,), np.uint8, "cuda", device_id)
    except Exception as error:  # onnxruntime's own classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} could not start on device {device_id}: {reason}") from None


@cache
def _load_libraries() -> str:
    """CUDA's and cuDNN's libraries from the packages of the extra ``gpu``, or the system's; what failed, or "".

    onnxruntime looks for them itself when it loads the provider, but in the loader's own places only.
    """
    output = io.StringIO()
    with redirect_stdout(output):  # it prints what it can't load
        ort.preload_dlls()
    failed = [line for line in output.getvalue().splitlines() if line.startswith(_FAILED)]
    return failed[0].removeprefix(_FAILED).partition(": ")[2] if failed else ""


def _load_tensorrt(name: str) -> None:
    """Have the provider find TensorRT's libraries: their package loads them from where the loader doesn't look."""
    try:
        import tensorrt

        found = f"TensorRT {tensorrt.__version__}"
    except (ImportError, OSError):
        found = "no tensorrt that can be imported"
    for library in _TENSORRT:
        try:
            ctypes.CDLL(library)
        except OSError:
            raise UserError(
                f"{name} could not start: it needs {library}, of TensorRT 10; here is {found}; "
                f"{installing(_TENSORRT_EXTRA)}"
            ) from None


def _take_as_asked() -> None:
    """Have memory that isn't a session's, the cache's, taken as it is asked for, in place of the next power of two.

    The sessions' own option is the documented one; for tensors made from Python there is only this. A release without
    it takes up to twice the cache.
    """
    from onnxruntime.capi import _pybind_state as state

    if hasattr(state, "set_arena_extend_strategy"):
        state.set_arena_extend_strategy(state.ArenaExtendStrategy.kSameAsRequested)
