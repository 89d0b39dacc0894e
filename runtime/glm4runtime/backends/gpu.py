"""The first visible NVIDIA GPU, as its driver describes it: no package is needed, and no context is made.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

import ctypes

# CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR and _MINOR
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76


def gpu_capability() -> str | None:
    """Its compute capability, such as ``8.9``; None where driver or GPU is missing."""
    values = _attributes(_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
    return None if values is None else f"{values[0]}.{values[1]}"


def gpu_multiprocessors() -> int | None:
    """How many multiprocessors it has; None as above."""
    values = _attributes(_MULTIPROCESSORS)
    return None if values is None else values[0]


def _attributes(*attributes: int) -> list[int] | None:
    device, count, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    values = []
    for attribute in attributes:
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        values.append(value.value)
    return values
