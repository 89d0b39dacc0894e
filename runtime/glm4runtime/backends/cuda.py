"""CUDA's runtime API through cuda-python (package ``cuda-bindings``), every return value checked.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from glm4runtime.contract import UserError, installing

ALIGNMENT = 256  # bytes; what TensorRT asks of every address


class Cuda:
    """The device's calls by name; each raises UserError with the call's name where it fails."""

    def __init__(self, api: Any) -> None:
        """api: the module ``cuda.bindings.runtime``. Raises UserError where there's no device."""
        self.api = api
        error, count = api.cudaGetDeviceCount()
        if int(error) or not count:
            reason = self.name_of(error) if int(error) else "none found"
            raise UserError(
                f"no CUDA device: cudaGetDeviceCount: {reason}; an NVIDIA GPU and its driver are needed, and for a "
                "driver older than CUDA 13's cuda-bindings 12: pip install 'cuda-bindings~=12.9'"
            )

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call ``name``; returns its result: None, one value, or a tuple."""
        error, *results = getattr(self.api, name)(*arguments)
        if int(error):
            raise UserError(f"{name} failed: {self.name_of(error)}")
        return results[0] if len(results) == 1 else tuple(results) or None

    def checked(self, name: str, *arguments: Any) -> Callable[[], None]:
        """A function that makes one call with fixed arguments: for loops."""
        call = getattr(self.api, name)

        def run() -> None:
            error = call(*arguments)[0]
            if int(error):
                raise UserError(f"{name} failed: {self.name_of(error)}")

        return run

    def name_of(self, error: Any) -> str:
        """``cudaErrorNoDevice (no CUDA-capable device is detected)``."""
        name, text = self.api.cudaGetErrorName(error)[1], self.api.cudaGetErrorString(error)[1]
        return f"{name.decode()} ({text.decode()})"


class Memory:
    """What one session holds on the device, which :meth:`close` gives back, and pinned host memory."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._held: list[Callable[[], Any]] = []  # what frees each thing held
        self._pinned: list[Any] = []  # blocks that copies under way may still use
        self._process = os.getpid()

    def device(self, size: int, what: str) -> int:
        """Address of ``size`` bytes of zeros on the device. Raises UserError naming ``what`` it was for."""
        try:
            address = int(self.cuda("cudaMalloc", max(size, 1)))
        except UserError as error:
            raise UserError(
                f"{what}: {size / 1e9:.2f} GB on the device: {error}; free device memory, or build the bundle with a "
                "smaller --max-seq-len or precision"
            ) from None
        self.keep("cudaFree", address)
        self.cuda("cudaMemset", address, 0, max(size, 1))
        return address

    def pinned(self, size: int) -> tuple[int, np.ndarray]:
        """Address and uint8 view of ``size`` bytes of host memory that copies to and from the device at full speed.

        It is given back behind :meth:`close`, with the last view of it: who keeps a row of logits may outlive the
        session.
        """
        address = int(self.cuda("cudaMallocHost", size))
        block = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(block, self.cuda.api.cudaFreeHost, address)
        self._pinned.append(block)
        return address, np.ctypeslib.as_array(block)

    def keep(self, release: str, handle: Any) -> Any:
        """Have ``release(handle)`` called at the end too; returns the handle."""
        self._held.append(partial(getattr(self.cuda.api, release), handle))
        return handle

    def at_close(self, call: Callable[[], Any]) -> None:
        """Have ``call`` made at the end, before what was held until now is freed."""
        self._held.append(call)

    def close(self) -> None:
        """Free everything, last things first, when the device is done with it.

        Results are not looked at: at the interpreter's end CUDA may be gone. Nothing is freed in a forked child, since
        what is held is its parent's.
        """
        if not self._held or os.getpid() != self._process:
            return
        self.cuda.api.cudaDeviceSynchronize()
        while self._held:
            self._held.pop()()
        self._pinned.clear()


def open_cuda(extra: str) -> Cuda:
    """The CUDA runtime. Raises UserError where cuda-python or a device is missing; ``extra``: what to install."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UserError(f"cuda-python cannot be imported ({error}); {installing(extra)}") from None
    return Cuda(runtime)
