"""The table of dtypes: each one's name, here and in manifests, its number in ONNX files, and its size."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    number: int  # in onnx.proto's TensorProto.DataType
    bits: int


DTYPES = {
    "float32": Dtype(1, 32),
    "uint8": Dtype(2, 8),
    "int8": Dtype(3, 8),
    "int32": Dtype(6, 32),
    "int64": Dtype(7, 64),
    "bool": Dtype(9, 8),
    "float16": Dtype(10, 16),
    "bfloat16": Dtype(16, 16),
    "float8_e4m3fn": Dtype(17, 8),
    "int4": Dtype(22, 4),
}
_WEIGHTS_ONLY = ("float8_e4m3fn", "int4")
#: Bytes of a number, for dtypes that graphs take and give.
DTYPE_BYTES = {name: dtype.bits // 8 for name, dtype in DTYPES.items() if name not in _WEIGHTS_ONLY}


def nbytes(dtype: str, count: int) -> int:
    """Bytes of that many numbers; int4's are packed, two to a byte."""
    return (count * DTYPES[dtype].bits + 7) // 8
