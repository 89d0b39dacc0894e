"""The caches of many sequences in one block of memory: any run of neighbouring places is a batch to a graph.

[2 * layers, places, kv_heads, max_seq_len, head_dim], all of it written once at the start: memory that a system has
promised and hasn't got is asked for then, not in the middle of somebody's answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from glm4runtime.backends.cache import tensor_type
from glm4runtime.backends.cuda import Cuda, Memory
from glm4runtime.backends.memory import memory_bytes
from glm4runtime.contract import DTYPE_BYTES, CacheSpec, UserError, past_name, present_name

_PARTS = ("key", "value")
_AT_ONCE = 64  # rows that change places, so that what is kept beside them stays small


class Pool(ABC):
    """Caches at ``places`` places. Rows are given and taken as uint8 [2 * layers, kv_heads, rows, head's bytes]."""

    device: str
    device_id = 0
    first_layer = 0
    _address: int

    def __init__(self, spec: CacheSpec, max_seq_len: int, places: int) -> None:
        """Raises UserError, with the arithmetic, where there's no memory for it."""
        self.max_seq_len, self.places = max_seq_len, places
        self._spec, self._type = spec, tensor_type(spec.dtype)
        width = spec.head_dim * DTYPE_BYTES[spec.dtype]
        self._shape = (2 * spec.layers, places, spec.kv_heads, max_seq_len, width)  # in bytes
        # Beside rows that change places: had now, so that no exchange stops half-way for want of memory
        self._aside = np.zeros(self.block_shape(min(_AT_ONCE, max_seq_len)), np.uint8)
        try:
            self._allocate(places * max_seq_len * spec.bytes_per_token)
        except (MemoryError, ValueError, UserError) as error:
            size = places * max_seq_len * spec.bytes_per_token
            raise UserError(
                f"the caches take {size / 1e9:.2f} GB: {places} sequences of {max_seq_len} tokens of "
                f"{spec.bytes_per_token} bytes ({spec.layers} layers, {spec.kv_heads} heads of {spec.head_dim} in "
                f"{spec.dtype}); they cannot be had ({error}): ask for fewer slots or a smaller max_seq_len"
            ) from None

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Bind past and present of every layer to ``count`` places from ``first`` on: graphs write in place."""
        _, _, heads, rows, _ = self._shape
        shape = (count, heads, rows, self._spec.head_dim)
        for layer, part, address in self._tensors(first):
            binding.bind_input(past_name(layer, part), self.device, self.device_id, self._type, shape, address)
            binding.bind_output(present_name(layer, part), self.device, self.device_id, self._type, shape, address)

    def addresses(self, first: int) -> dict[str, int]:
        """Where past and present of every layer are, by name, for places from ``first`` on."""
        names = (past_name, present_name)
        return {name(layer, part): address for layer, part, address in self._tensors(first) for name in names}

    def block_shape(self, rows: int) -> tuple[int, int, int, int]:
        """Of a block of so many rows."""
        tensors, _, heads, _, width = self._shape
        return tensors, heads, rows, width

    def exchange(self, one: int, other: int, rows: int, others: int) -> None:
        """Give place ``one`` the first ``others`` rows of place ``other``, and it the first ``rows`` of ``one``."""
        both = min(rows, others)
        for first in range(0, both, _AT_ONCE):
            end = min(first + _AT_ONCE, both)
            kept = self.read(one, first, end, self._aside[:, :, : end - first])
            self.copy(other, one, first, end)
            self.write(other, first, kept)
        if rows > both:
            self.copy(one, other, both, rows)
        elif others > both:
            self.copy(other, one, both, others)

    def _tensors(self, first: int) -> Iterator[tuple[int, str, int]]:
        """Layer, part and address of every tensor's places from ``first`` on."""
        tensors, places, heads, rows, width = self._shape
        for tensor in range(tensors):
            address = self._address + (tensor * places + first) * heads * rows * width
            yield self.first_layer + tensor // 2, _PARTS[tensor % 2], address

    @abstractmethod
    def read(self, place: int, first: int, end: int, to: np.ndarray | None = None) -> np.ndarray:
        """A copy of a place's rows ``first`` to ``end``, in ``to`` where that is given."""

    @abstractmethod
    def write(self, place: int, first: int, block: np.ndarray) -> None:
        """Put a block into a place from row ``first`` on."""

    @abstractmethod
    def copy(self, source: int, target: int, first: int, end: int) -> None:
        """Copy rows ``first`` to ``end`` of one place to those of another."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""

    @abstractmethod
    def _allocate(self, size: int) -> None:
        """Have ``size`` bytes of zeros, all of them touched, at ``_address``."""


class HostPool(Pool):
    """In the host's memory."""

    device = "cpu"

    def _allocate(self, size: int) -> None:
        if size > (available := memory_bytes()[1]):
            raise MemoryError(f"{available / 1e9:.2f} GB are free")
        self._memory = np.empty(self._shape, np.uint8)
        self._memory.fill(0)
        self._address = self._memory.ctypes.data

    def read(self, place: int, first: int, end: int, to: np.ndarray | None = None) -> np.ndarray:
        rows = self._memory[:, place, :, first:end]
        if to is None:
            return rows.copy()
        to[...] = rows
        return to

    def write(self, place: int, first: int, block: np.ndarray) -> None:
        self._memory[:, place, :, first : first + block.shape[2]] = block

    def copy(self, source: int, target: int, first: int, end: int) -> None:
        self._memory[:, target, :, first:end] = self._memory[:, source, :, first:end]

    def close(self) -> None:
        del self._memory


class DevicePool(Pool):
    """In a GPU's memory. Never run on one: docs/status.md."""

    device = "cuda"

    def __init__(
        self, spec: CacheSpec, max_seq_len: int, places: int, memory: Memory, device_id: int = 0, first_layer: int = 0
    ) -> None:
        """memory: what is held on the device. :meth:`close` gives all of it back."""
        self._cuda, self._held, self.device_id, self.first_layer = memory.cuda, memory, device_id, first_layer
        super().__init__(spec, max_seq_len, places)

    def _allocate(self, size: int) -> None:
        self._use_device()
        self._address = self._held.device(size, "caches")

    def read(self, place: int, first: int, end: int, to: np.ndarray | None = None) -> np.ndarray:
        self._use_device()
        block = np.empty(self.block_shape(end - first), np.uint8) if to is None else to
        for tensor, part in enumerate(block):
            self._transfer(_whole(part), self._at(tensor, place, first), part.shape, "cudaMemcpyDeviceToHost")
        return block

    def write(self, place: int, first: int, block: np.ndarray) -> None:
        self._use_device()
        for tensor, part in enumerate(block):
            self._transfer(self._at(tensor, place, first), _whole(part), part.shape, "cudaMemcpyHostToDevice")
        self._cuda("cudaDeviceSynchronize")

    def copy(self, source: int, target: int, first: int, end: int) -> None:
        self._use_device()
        for tensor in range(self._shape[0]):
            to, of = self._at(tensor, target, first), self._at(tensor, source, first)
            self._transfer(to, of, self.block_shape(end - first)[1:], "cudaMemcpyDeviceToDevice")
        self._cuda("cudaDeviceSynchronize")  # ONNX Runtime's stream doesn't wait for this one

    def close(self) -> None:
        self._cuda.api.cudaSetDevice(self.device_id)  # whatever it returns: at the interpreter's end CUDA may be gone
        self._held.close()

    def _use_device(self) -> None:
        """What waits for a device waits for the calling thread's own, and a graph on another one changes that."""
        self._cuda("cudaSetDevice", self.device_id)

    def _at(self, tensor: int, place: int, row: int) -> tuple[int, int]:
        """Address of a row in a place's first head, and bytes from there to the next head's."""
        _, places, heads, rows, width = self._shape
        return self._address + (((tensor * places + place) * heads) * rows + row) * width, rows * width

    def _transfer(self, to: tuple[int, int], of: tuple[int, int], shape: Sequence[int], kind: str) -> None:
        """Copy as many bytes of every head; to, of: address and bytes between heads; shape: heads, rows, width."""
        heads, rows, width = shape
        if rows:
            self._cuda("cudaMemcpy2D", *to, *of, rows * width, heads, getattr(self._cuda.api.cudaMemcpyKind, kind))


class SplitPool(Pool):
    """In the memory of several GPUs, each with the layers of its stages."""

    def __init__(
        self, spec: CacheSpec, max_seq_len: int, places: int, cuda: Cuda, stages: Sequence[tuple[int, int]]
    ) -> None:
        """stages: the layers and the device of each."""
        self._cuda, self._stages, self._pools = cuda, stages, list[DevicePool]()
        super().__init__(spec, max_seq_len, places)

    def bind(self, binding: Any, first: int, count: int) -> None:
        for pool in self._pools:
            pool.bind(binding, first, count)

    def read(self, place: int, first: int, end: int, to: np.ndarray | None = None) -> np.ndarray:
        return np.concatenate([pool.read(place, first, end) for pool in self._pools], out=to)

    def write(self, place: int, first: int, block: np.ndarray) -> None:
        for pool in self._pools:
            start = 2 * pool.first_layer
            pool.write(place, first, block[start : start + pool.block_shape(0)[0]])

    def copy(self, source: int, target: int, first: int, end: int) -> None:
        for pool in self._pools:
            pool.copy(source, target, first, end)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()

    def _allocate(self, size: int) -> None:
        first = 0
        try:
            for layers, device_id in self._stages:
                own = replace(self._spec, layers=layers)
                self._pools.append(DevicePool(own, self.max_seq_len, self.places, Memory(self._cuda), device_id, first))
                first += layers
        except BaseException:
            self.close()
            raise


def _whole(part: np.ndarray) -> tuple[int, int]:
    """Address of an array [heads, rows, width], each head's rows side by side, and bytes between its heads."""
    return part.ctypes.data, part.strides[0]
