"""A stand-in for CUDA's runtime over host memory; :mod:`tests.helpers.fake_tensorrt` says what it stands for."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.helpers.fake_tensorrt import IExecutionContext

ALIGNMENT = 256


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class Graph:
    """A captured graph, or one that is ready to be launched; empty once it's destroyed."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = list(work)


class FakeCuda:
    """``cuda.bindings.runtime`` for one stream. ``calls``: all, in order. ``failing``: names that return an error."""

    cudaMemcpyKind, cudaStreamCaptureMode = cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: dict[str, cudaError_t] = {}
        self.memory: dict[str, dict[int, int]] = {"device": {}, "pinned": {}}  # size by address
        self.handles: set[Any] = set()  # streams and graphs not destroyed yet
        self.pending: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        self.broken_rules: list[str] = []
        self._blocks: dict[int, Any] = {}

    def rule(self, holds: bool, words: str) -> None:
        """Note a rule that is broken, and raise."""
        if not holds:
            self.broken_rules.append(words)
            raise AssertionError(words)

    def living(self) -> list[IExecutionContext]:
        """The execution contexts that are, in the order they were made."""
        return sorted(self.contexts, key=lambda context: context._number)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        method = getattr(FakeCuda, f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self.failing:
                return (self.failing[name], None)
            result = method(self, *arguments)
            return (cudaError_t.cudaSuccess,) if result is None else (cudaError_t.cudaSuccess, result)

        return call

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def submit(self, work: Callable[[], None]) -> None:
        """Put work on the stream: into the graph being captured, or behind what waits."""
        (self.pending if self.captured is None else self.captured).append(work)

    def require(self, place: str, address: int, size: int) -> None:
        held = self.memory[place]
        assert any(base <= address and address + size <= base + length for base, length in held.items()), (
            f"{size} bytes at {address:#x} are not {place} memory"
        )

    def _allocate(self, place: str, size: int) -> int:
        block = ctypes.create_string_buffer(b"\xff" * (size + ALIGNMENT), size + ALIGNMENT)
        address = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        self._blocks[address] = block
        self.memory[place][address] = size
        return address

    def _copy(self, to: int, source: int, size: int, kind: int, *, pageable: bool = False) -> None:
        down = kind == cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.require("pinned" if down else "device", to, size)
        if not pageable:
            self.require("device" if down else "pinned", source, size)
        ctypes.memmove(to, source, size)

    def _cudaGetDeviceCount(self) -> int:
        return 1

    def _cudaSetDevice(self, device_id: int) -> None:
        assert device_id >= 0

    def _cudaGetErrorName(self, error: cudaError_t) -> bytes:
        return error.name.encode()

    def _cudaGetErrorString(self, error: cudaError_t) -> bytes:
        return b"as the driver puts it"

    def _cudaMalloc(self, size: int) -> int:
        assert size > 0
        return self._allocate("device", size)

    def _cudaMallocHost(self, size: int) -> int:
        return self._allocate("pinned", size)

    def _cudaFree(self, address: int) -> None:
        self.rule(not self.pending, "memory freed under work that waits")
        self.rule(all(address != context._scratch[0] for context in self.contexts), "a context's scratch memory freed")
        del self.memory["device"][address]

    def _cudaFreeHost(self, address: int) -> None:
        del self.memory["pinned"][address]

    def _cudaMemset(self, address: int, value: int, size: int) -> None:
        self.require("device", address, size)
        ctypes.memset(address, value, size)

    def _cudaMemcpy(self, to: int, source: int, size: int, kind: int) -> None:
        self._copy(to, source, size, kind, pageable=True)

    def _cudaMemcpy2D(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, kind: int
    ) -> None:
        assert 0 < width <= min(to_pitch, pitch) and height > 0
        self.rule(not self.pending, "memory copied under work that waits")
        for name, address, step in (("HostTo", source, pitch), ("ToHost", to, to_pitch)):
            if name not in cudaMemcpyKind(kind).name:
                self.require("device", address, (height - 1) * step + width)
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * pitch, width)

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        assert stream in self.handles
        self.submit(partial(self._copy, to, source, size, kind))

    def _cudaMemset2DAsync(self, address: int, pitch: int, value: int, width: int, height: int, stream: int) -> None:
        assert stream in self.handles and 0 < width <= pitch and height > 0
        self.require("device", address, (height - 1) * pitch + width)

        def fill() -> None:
            for row in range(height):
                ctypes.memset(address + row * pitch, value, width)

        self.submit(fill)

    def _handle(self) -> int:
        self.handles.add(handle := 1000 + len(self.calls))
        return handle

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._handle()

    def _cudaStreamSynchronize(self, stream: int) -> None:
        assert stream in self.handles and self.captured is None
        pending, self.pending = self.pending, []
        for work in pending:
            work()

    def _cudaDeviceSynchronize(self) -> None:
        for stream in [handle for handle in self.handles if isinstance(handle, int)]:
            self._cudaStreamSynchronize(stream)

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert not self.pending, "captured before the warm-up was done"
        self.captured = []

    def _cudaStreamEndCapture(self, stream: int) -> Any:
        assert self.captured is not None
        graph, self.captured = Graph(self.captured), None
        self.handles.add(graph)
        return graph

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self.handles.add(replay := Graph(graph.work))
        return replay

    def _cudaGraphLaunch(self, replay: Any, stream: int) -> None:
        assert replay in self.handles and stream in self.handles
        self.pending.extend(replay.work)

    def _destroy(self, handle: Any) -> None:
        self.rule(not self.pending, "a handle destroyed under work that waits")
        graphs = [held for held in self.handles if isinstance(held, Graph)]
        if isinstance(handle, Graph):
            handle.work.clear()
        else:
            self.rule(not graphs and not self.contexts, "a stream destroyed before its users")
        self.handles.remove(handle)

    _cudaStreamDestroy = _cudaGraphDestroy = _cudaGraphExecDestroy = _destroy
