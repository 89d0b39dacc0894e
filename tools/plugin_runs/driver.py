"""The kernels as TensorRT gets them, launched by the CUDA driver: PTX, and arguments in TensorRT's order.

No more shared memory than a launch may have unasked. Never run: docs/status.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm4export.tensorrt.plugin.aot import append_kernel, attend_kernel, combine_kernel
from glm4export.tensorrt.plugin.geometry import Geometry
from glm4export.tensorrt.plugin.tiles import Tile
from glm4runtime.contract import UserError

from .launch import Grid


class Driver:
    """``libcuda``, with every result checked. torch's context must be current: use a CUDA tensor first."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise UserError(f"no CUDA driver: {error}") from None

    def __call__(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise UserError(f"{function}: CUDA error {code}, {(text.value or b'unknown').decode()}")

    def load(self, ptx: str, name: str) -> ctypes.c_void_p:
        """The function ``name`` of a module that the driver compiles from PTX."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        return function


class Compiled:
    """The kernels of one geometry, compiled ahead of time; launched on torch's current stream."""

    def __init__(self, geometry: Geometry, capability: int, tiles: tuple[Tile, ...]) -> None:
        self._driver = Driver()
        attend = attend_kernel(geometry, capability, tiles)
        assert attend.tile is not None
        self.tile = attend.tile
        self._kernels = {
            "append": append_kernel(geometry, capability),
            "attend": attend,
            "combine": combine_kernel(geometry, capability),
        }
        self._functions = {name: self._driver.load(kernel.ptx, kernel.name) for name, kernel in self._kernels.items()}

    def __call__(self, kernel: str, grid: Grid, arguments: Sequence[Tensor | int]) -> None:
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int32(value)
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        made, stream = self._kernels[kernel], ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (made.threads, 1, 1)
        self._driver("cuLaunchKernel", self._functions[kernel], *grid, *block, made.shared, stream, pointers, None)
