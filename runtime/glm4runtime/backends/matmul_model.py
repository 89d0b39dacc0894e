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
    node = _text(1, b"A") + _text(1, b"B") + _text(2, b"Y") + _text(4, operator)
    dims = b"".join(_number(1, size) for size in weight.shape)
    initializer = dims + _number(2, stored) + _text(8, b"B") + _text(9, weight.tobytes())
    ends = _text(11, _value_info(b"A", given)) + _text(12, _value_info(b"Y", result))
    graph = _text(1, node) + _text(2, b"matmul") + _text(5, initializer) + ends
    return _number(1, 8) + _text(7, graph) + _text(8, _number(2, 17))  # IR version 8, opset 17


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
