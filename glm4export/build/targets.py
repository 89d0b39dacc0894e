"""Choose a target where the user names none."""

from __future__ import annotations

from pathlib import Path

from glm4export.tensorrt.flavour import installed_flavours
from glm4runtime.backends.gpu import gpu_capability
from glm4runtime.contract import TENSORRT, Target


def detect_target() -> Target:
    """The fastest here: with a GPU ``tensorrt``, or ``cuda`` where only onnxruntime can use it; else ``cpu``."""
    if installed_flavours() and gpu_capability() is not None:
        return TENSORRT
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return "cpu"
    found = Path("/dev/nvidia0").exists() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return "cuda" if found else "cpu"
