"""Opening a graph in ONNX Runtime on one of its execution providers.

Only ``cpu`` has ever run: docs/status.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from glm4runtime.backends.fork import refuse_in_children
from glm4runtime.backends.gpu_options import GpuOptions
from glm4runtime.backends.int8_range import use_eight_bits
from glm4runtime.backends.ort_cuda import start_cuda
from glm4runtime.contract import BundleError, UserError, installing

ort.disable_telemetry_events()  # for where the user's own code imported it before us: see glm4runtime/__init__.py

NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",  # a plugin: a package of its own, which onnxruntime loads
}
_WHOLE = (1, 27)  # of onnxruntime, the first with kernels for int8 caches and int8 prefill; 3.10's wheels end at 1.23
_EXTRAS = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu-tensorrt"}

_NO_MEMORY = ("Failed to allocate memory", "out of memory", "is smaller than requested bytes")  # its arena's words


def device_of(provider: str) -> str:
    """Where a provider's graphs read and write, in ONNX Runtime's words: ``cpu`` or ``cuda``."""
    return "cpu" if provider == "cpu" else "cuda"


def require_provider(provider: str, device_id: int = 0) -> None:
    """Raise UserError, with the way to install it, where ``provider``, a key of NAMES, is missing or can't start."""
    if provider == "tensorrt-rtx":
        _rtx_device()
        return
    name, available = NAMES[provider], ort.get_available_providers()
    if name not in available:
        raise UserError(
            f"{name} is not in the installed onnxruntime (it has {', '.join(available)}); "
            f"{installing(_EXTRAS[provider])}"
        )
    if provider != "cpu":
        start_cuda(name, device_id, tensorrt=provider == "tensorrt")


def open_session(
    path: Path, provider: str, threads: int, *, optimized: bool = False, options: Mapping[str, str] | None = None
) -> Any:
    """An onnxruntime.InferenceSession of the graph at ``path``.

    provider: a key of NAMES. threads: 0 lets ONNX Runtime choose. optimized: the graph was, before it was saved.
    options: the provider's own. Raises BundleError for a damaged graph, UserError where the provider can't start or
    the device has no memory for it.
    """
    name, settings = NAMES[provider], ort.SessionOptions()
    if optimized:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    # A worker that spins between two sessions' runs takes a core from the next one: 5% of a decode step on two cores.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider == "cpu":
        use_eight_bits(settings)
        settings.add_session_config_entry("session.prepack.enable_parallel", "1")  # weights repacked by all threads
    else:
        # A decode step's mask has a shape of its own at every length, and a plan of memory would be made for each.
        settings.enable_mem_pattern = False
    chosen: Any = [(name, dict(options or {}))]
    if provider == "tensorrt":
        chosen.append((NAMES["cuda"], GpuOptions(int(chosen[0][1].get("device_id", 0))).cuda()))  # nodes that it leaves
    elif provider == "tensorrt-rtx":
        settings.add_provider_for_devices([_rtx_device()], dict(options or {}))
        chosen = None
    try:
        session = ort.InferenceSession(path, settings, providers=chosen)
    except Exception as error:  # onnxruntime raises its own unrelated classes
        if provider != "cpu" and any(words in str(error) for words in _NO_MEMORY):
            raise UserError(
                f"{path}: not enough memory on the device: {str(error).splitlines()[0]}; free some, raise "
                "gpu_mem_limit, open the bundle with a smaller max_seq_len, or build it with less precision"
            ) from None
        older = f"; {lack}" if (lack := lacking_kernels()) else ""
        raise BundleError(f"{path}: onnxruntime cannot open it: {str(error).splitlines()[0]}{older}") from None
    if name not in session.get_providers():  # onnxruntime falls back to the CPU and only logs it
        raise UserError(f"{name} could not start; check the driver and the CUDA, cuDNN and TensorRT libraries it needs")
    refuse_in_children(session, "run", "run_with_iobinding", "io_binding")
    return session


def lacking_kernels() -> str:
    """What the installed onnxruntime is too old for, in a line; empty where it isn't."""
    if tuple(map(int, ort.__version__.split(".")[:2])) >= _WHOLE:
        return ""
    return (
        f"onnxruntime {ort.__version__} has no kernels for int8 caches and int8 prefill: they take "
        f"{'.'.join(map(str, _WHOLE))} or newer, and so Python 3.11 or newer"
    )


@cache
def _rtx_device() -> Any:
    """The first GPU that the TensorRT-RTX plugin can use. Raises UserError where there's no plugin or no GPU."""
    name = NAMES["tensorrt-rtx"]
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ModuleNotFoundError:
        raise UserError(
            f"{name} is not installed; pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx-cu12"
        ) from None
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        raise UserError(f"{name} could not be loaded: {str(error).splitlines()[0]}") from None
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise UserError(f"{name} found no GPU it can use; it needs an NVIDIA RTX GPU and its driver")
    return devices[0]
