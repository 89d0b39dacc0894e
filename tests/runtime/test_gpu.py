"""Which GPU is here, by a stand-in for the driver; the numbers of its attributes are those of cuda-bindings."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from glm4runtime.backends import gpu

CALLS = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute")


class Driver:
    """Device 0 as cuda-bindings' numbers have it; ``failing``: a call that gives an error."""

    def __init__(self, devices: int = 1, failing: str = "") -> None:
        cuda = pytest.importorskip("cuda.bindings.driver").CUdevice_attribute
        self.values = {
            int(cuda.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT): 142,
            int(cuda.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR): 8,
            int(cuda.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR): 9,
        }
        self.devices, self.failing = devices, failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.devices
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self.values[arguments[1]]
            return 100 if name == self.failing else 0

        return call


def test_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    assert (gpu.gpu_capability(), gpu.gpu_multiprocessors()) == ("8.9", 142)


@pytest.mark.parametrize("failing", [*CALLS, "no device", "no driver"])
def test_no_gpu(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_driver(name: str) -> Driver:
        if failing == "no driver":
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    driver = Driver(0 if failing == "no device" else 1, failing)
    monkeypatch.setattr(ctypes, "CDLL", open_driver)
    assert gpu.gpu_capability() is gpu.gpu_multiprocessors() is None
