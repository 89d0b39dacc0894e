"""Recipes: how each stored tensor is made from checkpoint tensors.

A recipe is a small expression. Passes rewrite expressions; data flows only when :mod:`glm4export.weights.write` reads
them, window by window, so that no tensor need ever be whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from glm4export.terminal.errors import InternalError
from glm4export.weights.quantize import (
    E4M3_MAX,
    Quantized,
    Scheme,
    joined,
    quantize,
    quantize_rows,
    quantize_rows_fp8,
    signed,
)
from glm4export.weights.tensors import Measured, Prequantized, Tensors, Window
from glm4graphs.config import Glm4Config
from glm4graphs.rope import rotary_tables
from glm4runtime.contract import nbytes


class Expr(Protocol):
    """An expression over checkpoint tensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, reader: Tensors, window: Window) -> Tensor:
        """Evaluate that window."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    def read(self, reader: Tensors, window: Window) -> Tensor:
        return reader.read(self.name, window)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RotaryTable:
    """cos or sin of every position's angles: computed, not stored in checkpoints.

    Columns beyond the config's are angle 0, which rotates nothing.
    """

    function: str  # "cos" or "sin"
    config: Glm4Config
    positions: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.positions, self.columns)

    def read(self, reader: Tensors, window: Window) -> Tensor:
        (first, stop), *columns = window
        cos, sin = rotary_tables(self.config, stop, first)  # these rows only: a table may be larger than the memory
        table, zero_angle = (cos, 1.0) if self.function == "cos" else (sin, 0.0)
        padded = torch.nn.functional.pad(table, (0, self.columns - table.shape[1]), value=zero_angle)
        return padded[(slice(None), *_slices(tuple(columns)))]

    def __str__(self) -> str:
        return f"rotary_{self.function}({self.positions} x {self.columns})"


@dataclass(frozen=True)
class Transpose:
    """A matrix with its dims swapped: checkpoints store linears [out, in], MatMul takes [in, out]."""

    of: Expr

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[::-1]

    def read(self, reader: Tensors, window: Window) -> Tensor:
        return self.of.read(reader, window[::-1]).T

    def __str__(self) -> str:
        return f"transpose({self.of})"


@dataclass(frozen=True)
class Concat:
    """Expressions one after another along the first dim."""

    parts: tuple[Expr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(self, reader: Tensors, window: Window) -> Tensor:
        rows, *rest = window
        return torch.cat([part.read(reader, (inside, *rest)) for part, inside in self.rows_of_parts(rows)])

    def rows_of_parts(self, rows: tuple[int, int]) -> Iterator[tuple[Expr, tuple[int, int]]]:
        """Each part that some of the rows are of, and which of its own rows they are."""
        offset = 0
        for part in self.parts:
            first, last = max(rows[0] - offset, 0), min(rows[1] - offset, part.shape[0])
            if first < last:
                yield part, (first, last)
            offset += part.shape[0]

    def __str__(self) -> str:
        return f"concat({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Scale:
    """Multiply the rows from ``start`` on by a power of two, which is exact in every float format that holds both."""

    of: Expr
    factor: float
    start: int = 0

    def __post_init__(self) -> None:
        if math.frexp(self.factor)[0] != 0.5:
            raise ValueError(f"scale factor {self.factor} is not a power of two")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, reader: Tensors, window: Window) -> Tensor:
        # float32: a float16 checkpoint must not lose its subnormals before the final cast
        data = self.of.read(reader, window).to(torch.float32)
        first, last = window[0]
        if last > self.start:
            data[max(self.start - first, 0) :] *= self.factor
        return data

    def __str__(self) -> str:
        rows = f", rows {self.start}:" if self.start else ""
        return f"scale({self.of}, 2^{round(math.log2(self.factor))}{rows})"


@dataclass(frozen=True)
class QuantizedPart:
    """One stored tensor of a block-quantized matrix [rows, columns]: ``data``, ``scales`` or ``zero_points``.

    layout: ``blocks`` as MatMulNBits takes it; ``flat``, one dim for all of a row's bytes, as GatherBlockQuantized
    does; ``transposed``, as DequantizeLinear does in front of MatMul: integers [columns, rows], scales [blocks, rows].
    """

    of: Expr
    scheme: Scheme
    part: str
    layout: str = "blocks"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.of.shape
        blocks = columns // self.scheme.block
        if self.layout == "transposed":
            return (columns if self.part == "data" else blocks, rows)
        row_bytes = columns * self.scheme.bits // 8
        if self.part == "data":
            return (rows, row_bytes) if self.layout == "flat" else (rows, blocks, row_bytes // blocks)
        return (rows, blocks if self.part == "scales" else -(-blocks * self.scheme.bits // 8))

    def quantize(self, reader: Tensors, rows: tuple[int, int]) -> Quantized:
        """All parts of some rows."""

        def ready(given: Prequantized, name: str, inside: tuple[int, int]) -> Quantized | None:
            return given.quantized(name, self.scheme, inside)

        def search(weight: Tensor) -> Quantized:
            return quantize(weight, self.scheme)

        return _quantized(self.of, reader, rows, ready, search)

    def pick(self, quantized: Quantized) -> Tensor:
        """This part's tensor, in the layout of rows."""
        tensor: Tensor = getattr(quantized, self.part)
        return tensor.flatten(1) if self.layout == "flat" else tensor

    def transposed(self, reader: Tensors, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """int8 data [columns, rows] and float32 scales [blocks, rows] of some rows of a symmetric matrix."""
        quantized = self.quantize(reader, rows)
        return signed(quantized.data, self.scheme).T, quantized.scales.T

    def read(self, reader: Tensors, window: Window) -> Tensor:
        if self.layout == "transposed":
            data, scales = self.transposed(reader, window[1])
            return (data if self.part == "data" else scales)[_slices(window[:1])]
        return self.pick(self.quantize(reader, window[0]))[(slice(None), *_slices(window[1:]))]

    def __str__(self) -> str:
        return f"{self.part}({self.scheme}, {self.of})"


@dataclass(frozen=True)
class RowQuantizedPart:
    """A matrix [rows, columns] in int8 or fp8 with one scale per row: ``data``, stored transposed, or ``scales``.

    Scales have values of ``scale_dtype``.
    """

    of: Expr
    part: str
    scale_dtype: torch.dtype = torch.float32
    dtype: str = "int8"  # or "float8_e4m3fn", whose bits are int8 in memory

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.of.shape
        return (columns, rows) if self.part == "data" else (rows,)

    def transposed(self, reader: Tensors, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """int8 data [columns, rows] and float32 scales [rows] of some rows."""

        def ready(given: Prequantized, name: str, inside: tuple[int, int]) -> Quantized | None:
            return given.quantized_rows(name, self.dtype, self.scale_dtype, inside)

        def search(weight: Tensor) -> Quantized:
            quantizer = quantize_rows if self.dtype == "int8" else quantize_rows_fp8
            return Quantized(*quantizer(weight, scale_dtype=self.scale_dtype), None)

        quantized = _quantized(self.of, reader, rows, ready, search)
        return quantized.data.view(torch.int8).T, quantized.scales

    def read(self, reader: Tensors, window: Window) -> Tensor:
        data, scales = self.transposed(reader, window[-1])
        return data[_slices(window[:1])] if self.part == "data" else scales

    def __str__(self) -> str:
        return f"{self.part}({self.dtype} rows, {self.of})"


@dataclass(frozen=True)
class InputScale:
    """The fp8 scale of an input that some linears share: what it reached in calibration over E4M3's largest number."""

    linears: tuple[str, ...]
    factor: float = 1.0  # the graph's activations over the checkpoint's

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def read(self, reader: Tensors, window: Window) -> Tensor:
        reach = max(_measured(reader).input_reach(name) for name in self.linears)
        return torch.tensor(reach * self.factor / E4M3_MAX)

    def __str__(self) -> str:
        scaled = f", 2^{round(math.log2(self.factor))}" if self.factor != 1 else ""
        return f"input_scale({', '.join(self.linears)}{scaled})"


@dataclass(frozen=True)
class CacheScales:
    """The step of an int8 cache in each channel of one layer's ``key`` or ``value``: measured, not in checkpoints.

    [kv_heads, 1, head_dim], as it multiplies a cache [batch, kv_heads, max_seq, head_dim]. ``by_head``: [kv_heads], one
    step for all of a head's channels, the largest that any needs.
    """

    layer: int
    part: str
    config: Glm4Config
    by_head: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (
            (self.config.num_key_value_heads,)
            if self.by_head
            else (self.config.num_key_value_heads, 1, self.config.head_dim)
        )

    def read(self, reader: Tensors, window: Window) -> Tensor:
        scales = _measured(reader).cache_scales(self.layer, self.part)
        return (scales.amax((1, 2)) if self.by_head else scales)[_slices(window)]

    def __str__(self) -> str:
        return f"cache_scales({self.part}, layer {self.layer}{', by head' if self.by_head else ''})"


@dataclass(frozen=True)
class Recipe:
    """An expression and the dtype it is stored in, in ONNX's spelling such as ``float16``."""

    expr: Expr
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.expr.shape

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, math.prod(self.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """What its values are in memory: fp8's bits are int8's; int4 is packed, two to a byte, when it is written."""
        if self.dtype in ("int4", "float8_e4m3fn"):
            return torch.int8
        return cast(torch.dtype, getattr(torch, self.dtype))

    def __str__(self) -> str:
        return f"{self.dtype}({self.expr})"


def _measured(reader: Tensors) -> Measured:
    if not isinstance(reader, Measured):
        raise InternalError("a recipe asks for what calibration measures, and nothing was calibrated")
    return reader


_Ready = Callable[[Prequantized, str, tuple[int, int]], Quantized | None]


def _quantized(
    expr: Expr, reader: Tensors, rows: tuple[int, int], ready: _Ready, search: Callable[[Tensor], Quantized]
) -> Quantized:
    """Rows of an expression, as they came quantized where they did, else by a search on their values."""
    if isinstance(expr, Concat):
        return joined([_quantized(part, reader, inside, ready, search) for part, inside in expr.rows_of_parts(rows)])
    return _given(expr, reader, rows, ready) or search(expr.read(reader, (rows, (0, expr.shape[1]))))


def _given(expr: Expr, reader: Tensors, rows: tuple[int, int], ready: _Ready) -> Quantized | None:
    """Rows of one checkpoint tensor, or of one that is scaled, where it came quantized."""
    if isinstance(expr, Source):
        return ready(reader, expr.name, rows) if isinstance(reader, Prequantized) else None
    if isinstance(expr, Scale):
        given = _given(expr.of, reader, rows, ready)
        if given is not None:
            # a power of two, so exact where fp16 holds it as a normal number: int8's smallest scales it doesn't
            given.scales[max(expr.start - rows[0], 0) :] *= expr.factor
        return given
    raise InternalError(f"recipe {expr}: what came quantized can't be found below a {type(expr).__name__}")


def map_sources(expr: Expr, change: Callable[[Source], Expr]) -> Expr:
    """The same expression with every checkpoint tensor in it replaced by ``change(tensor)``."""
    if isinstance(expr, Source):
        return change(expr)
    if isinstance(expr, Transpose):
        return Transpose(map_sources(expr.of, change))
    if isinstance(expr, Concat):
        return Concat(tuple(map_sources(part, change) for part in expr.parts))
    if isinstance(expr, Scale):
        return Scale(map_sources(expr.of, change), expr.factor, expr.start)
    if isinstance(expr, QuantizedPart | RowQuantizedPart):
        return replace(expr, of=map_sources(expr.of, change))
    if isinstance(expr, RotaryTable | CacheScales | InputScale):
        return expr  # made without reading a tensor of the checkpoint
    raise InternalError(f"recipe {expr}: no pass knows how to change a {type(expr).__name__}")


def _slices(window: Window) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in window)
