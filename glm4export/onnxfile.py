"""Read a graph's nodes and stored tensors, and write a one-node model, without the ``onnx`` package.

Benchmarks run where bundles run, on machines that have the runtime's packages only. The few field numbers used are
those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, the encoding is protobuf's:
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm4runtime.contract import BundleError

FLOAT, UINT8, INT8, INT32, FLOAT16, BFLOAT16, E4M3, INT4 = 1, 2, 3, 6, 10, 16, 17, 22  # TensorProto.DataType
_ITEM_BYTES = {FLOAT: 4, UINT8: 1, INT8: 1, 4: 2, 5: 2, INT32: 4, 7: 8, 9: 1, FLOAT16: 2, 11: 8, BFLOAT16: 2}
_NAMES = {
    FLOAT: "float32",
    UINT8: "uint8",
    INT8: "int8",
    INT32: "int32",
    7: "int64",
    FLOAT16: "float16",
    BFLOAT16: "bfloat16",
    E4M3: "float8_e4m3fn",
    INT4: "int4",
}
_HALF_BYTE = (21, INT4)  # 21: uint4


@dataclass(frozen=True)
class Stored:
    """A tensor that a graph holds: ``dtype`` is TensorProto's number."""

    dtype: int
    shape: tuple[int, ...]

    @property
    def dtype_name(self) -> str:
        """Its dtype in ONNX's spelling, lower case; its number where no bundle stores such."""
        return _NAMES.get(self.dtype, str(self.dtype))

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        count = math.prod(self.shape)
        return (count + 1) // 2 if self.dtype in _HALF_BYTE else count * _ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Node:
    """One node: its operator and that one's domain, the names of its inputs, and its integer attributes."""

    domain: str
    op: str
    inputs: tuple[str, ...]
    integers: dict[str, int]


@dataclass(frozen=True)
class Graph:
    """The nodes of a graph in order, and its stored tensors by name."""

    nodes: tuple[Node, ...]
    stored: dict[str, Stored]


def read_graph(path: Path) -> Graph:
    """Read an ONNX file; its external data isn't touched. Raises BundleError where it isn't one."""
    try:
        graph = next(value for number, value in _fields(path.read_bytes()) if number == 7)
        assert isinstance(graph, bytes)
        fields = [(number, value) for number, value in _fields(graph) if isinstance(value, bytes)]
        nodes = tuple(_node(value) for number, value in fields if number == 1)
        return Graph(nodes, dict(_stored(value) for number, value in fields if number == 5))
    except (IndexError, ValueError, StopIteration, AssertionError) as error:
        raise BundleError(f"{path}: not a readable ONNX graph ({error}); build the bundle again") from None


def matmul_model(weight: np.ndarray) -> bytes:
    """A model that multiplies its input ``A`` [rows, depth] with a stored weight [depth, columns].

    float32 weights give MatMul, int8 ones MatMulInteger with an unsigned ``A``.
    """
    exact = weight.dtype == np.int8
    stored, given, result = (INT8, UINT8, INT32) if exact else (FLOAT, FLOAT, FLOAT)
    operator = b"MatMulInteger" if exact else b"MatMul"
    node = _text(1, b"A") + _text(1, b"B") + _text(2, b"Y") + _text(4, operator)
    dims = b"".join(_number(1, size) for size in weight.shape)
    initializer = dims + _number(2, stored) + _text(8, b"B") + _text(9, weight.tobytes())
    ends = _text(11, _value_info(b"A", given)) + _text(12, _value_info(b"Y", result))
    graph = _text(1, node) + _text(2, b"matmul") + _text(5, initializer) + ends
    return _number(1, 8) + _text(7, graph) + _text(8, _number(2, 17))  # IR version 8, opset 17


def _node(data: bytes) -> Node:
    inputs, op, domain, integers = [], "", "", {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            inputs.append(value.decode())
        elif number == 4 and isinstance(value, bytes):
            op = value.decode()
        elif number == 7 and isinstance(value, bytes):
            domain = value.decode()
        elif number == 5 and isinstance(value, bytes):
            fields = dict(_fields(value))
            name, integer = fields.get(1), fields.get(3)
            if isinstance(name, bytes) and isinstance(integer, int):
                integers[name.decode()] = integer
    return Node(domain, op, tuple(inputs), integers)


def _stored(data: bytes) -> tuple[str, Stored]:
    name, dtype, shape = "", 0, []
    for number, value in _fields(data):
        if number == 1:  # one by one, or all packed into one field
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8 and isinstance(value, bytes):
            name = value.decode()
    return name, Stored(dtype, tuple(shape))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: a varint as int, anything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {at}")
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise ValueError(f"cut off at byte {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a byte, a negative one as the 64-bit two's complement that it is; and the byte after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value - (1 << 64) if value >> 63 else value, at
        shift += 7


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _encode(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _number(field: int, value: int) -> bytes:
    return _encode(field << 3) + _encode(value)


def _text(field: int, value: bytes) -> bytes:
    return _encode(field << 3 | 2) + _encode(len(value)) + value


def _value_info(name: bytes, dtype: int) -> bytes:
    """An input or output of two dynamic dims."""
    shape = _text(1, b"") * 2
    return _text(1, name) + _text(2, _text(1, _number(1, dtype) + _text(2, shape)))
