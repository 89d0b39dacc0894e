"""Read an ONNX file without ``onnx``: inputs, outputs, nodes, stored tensors, and the external files it names.

The few field numbers used are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, the encoding is
protobuf's: https://protobuf.dev/programming-guides/encoding/. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm4runtime.contract import DTYPES, BundleError, TensorSpec, nbytes

_NAMES = {dtype.number: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that a graph holds: ``dtype`` is a name, or TensorProto's number where no bundle stores such."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes; a byte a number where no bundle stores such."""
        count = math.prod(self.shape)
        return nbytes(self.dtype, count) if self.dtype in DTYPES else count


@dataclass(frozen=True)
class Node:
    """One node: its operator and that one's domain, the names of its inputs, and its attributes.

    ``integers`` has those that are one, ``attributes`` each of them as the file spells it, sorted.
    """

    domain: str
    op: str
    inputs: tuple[str, ...]
    integers: dict[str, int]
    attributes: tuple[bytes, ...]


@dataclass(frozen=True)
class Graph:
    """A graph: its nodes in order, its stored tensors by name, what it takes and gives, and what it reads."""

    nodes: tuple[Node, ...]
    stored: dict[str, Stored]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: frozenset[str]  # that hold data of its tensors, by paths relative to its own folder


def read_graph(path: Path) -> Graph:
    """Read an ONNX file; the files that it names aren't touched. Raises BundleError where it isn't one."""
    try:
        model = path.read_bytes()
        graph = next(value for number, value in _fields(model) if number == 7)
        assert isinstance(graph, bytes)
        fields = [(number, value) for number, value in _fields(graph) if isinstance(value, bytes)]
        return Graph(
            nodes=tuple(_node(value) for number, value in fields if number == 1),
            stored=dict(_stored(value) for number, value in fields if number == 5),
            inputs=tuple(_end(value) for number, value in fields if number == 11),
            outputs=tuple(_end(value) for number, value in fields if number == 12),
            files=frozenset(_files(model)),
        )
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    except (IndexError, ValueError, StopIteration, AssertionError) as error:
        raise BundleError(f"{path}: not a readable ONNX graph ({error}); build the bundle again") from None


def _node(data: bytes) -> Node:
    inputs, op, domain, integers, attributes = [], "", "", {}, []
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            inputs.append(value.decode())
        elif number == 4 and isinstance(value, bytes):
            op = value.decode()
        elif number == 7 and isinstance(value, bytes):
            domain = value.decode()
        elif number == 5 and isinstance(value, bytes):
            attributes.append(value)
            fields = dict(_fields(value))
            name, integer = fields.get(1), fields.get(3)
            if isinstance(name, bytes) and isinstance(integer, int):
                integers[name.decode()] = integer
    return Node(domain, op, tuple(inputs), integers, tuple(sorted(attributes)))


def _stored(data: bytes) -> tuple[str, Stored]:
    name, dtype, shape = "", 0, []
    for number, value in _fields(data):
        if number == 1:  # one by one, or all packed into one field
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8 and isinstance(value, bytes):
            name = value.decode()
    return name, Stored(_name_of(dtype), tuple(shape))


def _message(data: bytes) -> dict[int, bytes]:
    """The last value of every field that is bytes; an empty one where the field isn't there is up to the caller."""
    return {number: value for number, value in _fields(data) if isinstance(value, bytes)}


def _end(data: bytes) -> TensorSpec:
    """An input or output. A dim without a number is named, or has the empty name."""
    info = _message(data)
    tensor = _message(info.get(2, b"")).get(1, b"")  # TypeProto.tensor_type
    dtype, dims = 0, list[int | str]()
    for number, value in _fields(tensor):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2 and isinstance(value, bytes):
            for _, dim in _fields(value):
                assert isinstance(dim, bytes)
                size = next((held for _, held in _fields(dim)), "")
                dims.append(size.decode() if isinstance(size, bytes) else size)
    return TensorSpec(info.get(1, b"").decode(), _name_of(dtype), tuple(dims))


def _name_of(dtype: int) -> str:
    return _NAMES.get(dtype, str(dtype))


# Where tensors may be: for every kind of message, the kinds that its fields hold.
_HOLDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def _files(model: bytes) -> Iterator[str]:
    """The location of every tensor that is stored in another file, wherever in the model the tensor is."""
    waiting = [("model", model)]
    while waiting:
        kind, data = waiting.pop()
        if kind == "entry":  # of TensorProto.external_data
            entry = _message(data)
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
            continue
        held = _HOLDS[kind]
        waiting += [
            (held[number], value) for number, value in _fields(data) if number in held and isinstance(value, bytes)
        ]


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
