"""Device buffers with a fixed address, and the KV cache made of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort

from glm4runtime.contract import CacheSpec, UserError, past_name, present_name

_ONNX_BFLOAT16 = 16  # numpy has no such dtype; onnxruntime takes ONNX's number for it


def tensor_type(dtype: str) -> Any:
    """A dtype as bindings take it."""
    return _ONNX_BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


class Buffer:
    """A tensor allocated once, that graphs read or write in place; a binding may cover only its beginning.

    On ``cpu`` the memory is numpy's (zero pages cost nothing until they are written), elsewhere ONNX Runtime's.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str, device_id: int = 0) -> None:
        """Raises UserError, with the size, where there's no memory for it."""
        self.shape = tuple(shape)
        self.dtype = tensor_type(dtype)
        self._device_id = device_id
        self.device = device
        self._stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)  # of the same size
        try:
            if device == "cpu":
                self.array = np.zeros(self.shape, self._stored)
                self.address: int = self.array.ctypes.data
            else:
                self._value = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, self._stored, device, device_id)
                self.address = self._value.data_ptr()
        except Exception as error:  # MemoryError, ValueError, and onnxruntime's own unrelated classes
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
            size = math.prod(self.shape) * self._stored.itemsize
            raise UserError(
                f"{size / 1e9:.2f} GB for a tensor {list(self.shape)} of {dtype} on {device} cannot be had: {reason}"
            ) from None

    @cached_property
    def host(self) -> np.ndarray:
        """Host memory of the buffer's shape to fill before :meth:`upload`; on ``cpu`` the buffer itself."""
        return self.array if self.device == "cpu" else np.zeros(self.shape, self._stored)

    def upload(self) -> None:
        """Copy :attr:`host`, all of it, to the device."""
        if self.device != "cpu":
            self._value.update_inplace(self.host)

    def write(self, data: np.ndarray) -> None:
        """Copy host data of the buffer's whole shape and dtype into it."""
        if self.device == "cpu":
            np.copyto(self.array, data)
        else:
            self._value.update_inplace(data)

    def read(self) -> np.ndarray:
        """What the buffer holds; on ``cpu`` the buffer itself. bfloat16 comes as uint16."""
        return self.array if self.device == "cpu" else np.asarray(self._value.numpy())

    def clear(self) -> None:
        """Fill the buffer with zeros; on ``cpu`` it starts with them."""
        self.write(np.zeros(self.shape, self._stored))

    def part(self, index: int) -> Buffer:
        """The tensor at ``index`` of the first dim, in the same memory; off ``cpu`` only to be bound."""
        part = copy.copy(self)
        part.shape = self.shape[1:]
        part.address = self.address + index * math.prod(part.shape) * self._stored.itemsize
        if self.device == "cpu":
            part.array = self.array[index]
        return part

    def bind_input(self, binding: Any, name: str, shape: Sequence[int] | None = None) -> None:
        """Bind the buffer's first elements, seen as ``shape`` (all of it when None), to a graph input."""
        binding.bind_input(
            name, self.device, self._device_id, self.dtype, self.shape if shape is None else shape, self.address
        )

    def bind_rows(self, binding: Any, name: str, first: int, count: int) -> None:
        """Bind ``count`` rows of a matrix [rows, columns] from row ``first`` on to a graph input; none is possible."""
        columns = self.shape[1]
        address = self.address + first * columns * self._stored.itemsize
        binding.bind_input(name, self.device, self._device_id, self.dtype, (count, columns), address)

    def bind_output(self, binding: Any, name: str, shape: Sequence[int] | None = None) -> None:
        """The same for a graph output."""
        binding.bind_output(
            name, self.device, self._device_id, self.dtype, self.shape if shape is None else shape, self.address
        )


class Cache:
    """One sequence's keys and values for every layer, each [1, kv_heads, max_seq_len, head_dim], written in place.

    All lie in one allocation on each device: its memory is handed out in larger pieces than a layer needs.
    """

    def __init__(
        self, spec: CacheSpec, max_seq_len: int, device: str, device_ids: Sequence[int] = (), first_layer: int = 0
    ) -> None:
        """device_ids: the device of each layer; none: the first. first_layer: of the model, that is the cache's first.

        Raises UserError, with the sizes, where there's no memory for it.
        """
        self.max_seq_len = max_seq_len
        self._wholes: list[Buffer] = []
        self._buffers: dict[tuple[int, str], Buffer] = {}
        ids = device_ids or [0] * spec.layers
        try:
            for device_id in dict.fromkeys(ids):
                layers = [first_layer + index for index, own in enumerate(ids) if own == device_id]
                parts = [(layer, part) for layer in layers for part in ("key", "value")]
                shape = (len(parts), 1, spec.kv_heads, max_seq_len, spec.head_dim)
                whole = Buffer(shape, spec.dtype, device, device_id)
                self._wholes.append(whole)
                self._buffers.update((part, whole.part(index)) for index, part in enumerate(parts))
        except UserError as error:
            raise UserError(
                f"the cache of {max_seq_len} tokens takes {spec.bytes_per_token * max_seq_len / 1e9:.2f} GB "
                f"({spec.layers} layers, {spec.kv_heads} heads of {spec.head_dim} in {spec.dtype}): {error}; open the "
                "bundle with a smaller max_seq_len"
            ) from None

    def bind(self, binding: Any) -> None:
        """Bind past and present of every layer to the same memory: the graph appends, nothing is copied."""
        for (layer, part), buffer in self._buffers.items():
            buffer.bind_input(binding, past_name(layer, part))
            buffer.bind_output(binding, present_name(layer, part))

    def bits(self, length: int) -> list[bytes]:
        """The first ``length`` rows of every buffer; on ``cpu`` only, [] elsewhere."""
        return [buffer.array[:, :, :length].tobytes() for buffer in self._buffers.values() if buffer.device == "cpu"]

    def clipped(self, length: int) -> float | None:
        """Of an int8 cache's first ``length`` rows, the share of values at the ends of its range: -128, -127, 127.

        None for a cache of another dtype.
        """
        if self._wholes[0].dtype != np.int8:
            return None
        kept = (rows for whole in self._wholes for rows in whole.read()[:, :, :, :length])
        shares = [np.mean((rows >= 127) | (rows <= -127)) for rows in kept]
        return float(np.mean(shares))

    def clear(self) -> None:
        """Make every row finite: a step graph multiplies the rows it masks by zero, and zero times NaN is NaN."""
        for whole in self._wholes:
            whole.clear()
