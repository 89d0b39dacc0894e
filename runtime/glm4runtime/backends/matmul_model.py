"""Write a one-node ONNX model without the ``onnx`` package, to find out how this machine multiplies.

Field numbers and encoding: see :mod:`glm4runtime.contract.onnxfile`, which reads.
"""

from __future__ import annotations

import numpy as np

from glm4runtime.contract import DTYPES


def matmul_model(weight: np.ndarray) -> bytes:
    """A model that multiplies its input ``A`` [rows, depth] with a stored weight [depth, columns].

    float32 weights give MatMul, int8 ones MatMulInteger with an unsigned ``A``.
    """
    exact = weight.dtype == np.int8
    names = ("int8", "uint8", "int32") if exact else ("float32", "float32", "float32")
    stored, given, result = (DTYPES[name].number for name in names)
    operator = b"MatMulInteger" if exact else b"MatMul"
    return _model(_inputs(b"A", b"B") + _text(4, operator), {b"B": (stored, weight)}, given, result)


def int4_model(packed: np.ndarray, scales: np.ndarray) -> bytes:
    """The same with MatMulNBits: a float32 ``A``, packed uint8 [columns, blocks, block / 2] and float32 scales.

    ``A`` is rounded to int8, as in the graphs of int4 bundles.
    """
    columns, blocks, half = packed.shape
    sizes = {b"K": 2 * blocks * half, b"N": columns, b"bits": 4, b"block_size": 2 * half, b"accuracy_level": 4}
    attributes = b"".join(_text(5, _text(1, name) + _number(3, size) + _number(20, 2)) for name, size in sizes.items())
    node = _inputs(b"A", b"B", b"scales") + _text(4, b"MatMulNBits") + attributes + _text(7, _CONTRIB)
    wide, bits = DTYPES["float32"].number, DTYPES["uint8"].number
    return _model(node, {b"B": (bits, packed), b"scales": (wide, scales)}, wide, wide)


_CONTRIB = b"com.microsoft"


def _inputs(*names: bytes) -> bytes:
    return b"".join(_text(1, name) for name in names) + _text(2, b"Y")


def _model(node: bytes, stored: dict[bytes, tuple[int, np.ndarray]], given: int, result: int) -> bytes:
    """A model of one node from ``A`` to ``Y``, whose dtypes are ``given`` and ``result``."""
    graph = _text(1, node) + _text(2, b"matmul")
    for name, (dtype, values) in stored.items():
        dims = b"".join(_number(1, size) for size in values.shape)
        graph += _text(5, dims + _number(2, dtype) + _text(8, name) + _text(9, values.tobytes()))
    graph += _text(11, _value_info(b"A", given)) + _text(12, _value_info(b"Y", result))
    opsets = _text(8, _number(2, 17)) + _text(8, _text(1, _CONTRIB) + _number(2, 1))
    return _number(1, 8) + _text(7, graph) + opsets  # IR version 8, opset 17


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
