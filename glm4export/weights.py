"""The streaming writer of weights.bin: recipes in, one aligned file out, a window at a time.

Peak memory is a few windows, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from glm4export.quantize import Quantized, Scheme, pack_signed
from glm4export.recipes import Expr, QuantizedPart, Recipe, RowQuantizedPart, TensorReader, Window, whole
from glm4runtime.contract import FileSpec, UserError

ALIGNMENT = 4096  # bytes; a page, so that every tensor can be mapped on its own
WINDOW_ELEMENTS = 1 << 24  # 64 MiB as float32
QUANTIZED_ELEMENTS = 1 << 23  # weights quantized at a time

Progress = Callable[[int], None]  # told how many more bytes were written


class WeightError(UserError):
    """Weights that can't be stored in the chosen precision."""


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in weights.bin."""

    offsets: Mapping[str, int]
    size: int


def lay_out(recipes: Mapping[str, Recipe]) -> Layout:
    """Place tensors one after another, in the given order, each on a page boundary."""
    offsets, end = {}, 0
    for name, recipe in recipes.items():
        offsets[name] = math.ceil(end / ALIGNMENT) * ALIGNMENT
        end = offsets[name] + recipe.nbytes
    return Layout(offsets, end)


def write_weights(
    path: Path, recipes: Mapping[str, Recipe], layout: Layout, reader: TensorReader, progress: Progress
) -> FileSpec:
    """Evaluate every recipe into ``path``; returns its size and sha256, taken while writing.

    Raises WeightError where a value isn't finite in the stored dtype, naming the tensor; OSError where the disk fails.
    """
    digest, position = hashlib.sha256(), 0
    with path.open("wb") as file:
        for name, block in _ahead(_blocks(recipes, reader)):
            data = block.view(torch.uint8).numpy().data.cast("B")
            for piece in (b"\0" * max(0, layout.offsets[name] - position), data):
                file.write(piece)
                digest.update(piece)
                position += len(piece)
            progress(len(data))
    return FileSpec(position, digest.hexdigest())


def _blocks(recipes: Mapping[str, Recipe], reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Every recipe's windows in file order, in their stored dtype."""
    evaluator = _Evaluator(reader)
    for name, recipe in recipes.items():
        try:
            for block in evaluator.blocks(recipe.expr):
                block = block.to(recipe.torch_dtype).contiguous()
                if not torch.isfinite(block).all():
                    raise ValueError(f"a value is not finite in {recipe.dtype}")
                yield name, pack_signed(block) if recipe.dtype == "int4" else block
        except ValueError as error:
            raise WeightError(
                f"{name}: {error}; the checkpoint holds NaN or numbers beyond its range. Build with --precision fp32"
            ) from None


class _Evaluator:
    """Evaluates expressions by windows, and each quantized matrix once.

    With its data come scales and zero points, which are stored behind it: they are kept until their turn.
    """

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        self.small_parts: dict[tuple[Expr, Scheme], list[Quantized]] = {}
        self.row_scales: dict[Expr, list[Tensor]] = {}

    def blocks(self, expr: Expr) -> Iterator[Tensor]:
        """The expression's windows, in order."""
        if isinstance(expr, QuantizedPart) and expr.layout == "transposed":
            yield expr.read(self.reader, whole(expr.shape))
        elif isinstance(expr, QuantizedPart):
            yield from self._block_quantized(expr)
        elif isinstance(expr, RowQuantizedPart):
            yield from [self._transposed_int8(expr)] if expr.part == "data" else self.row_scales.pop(expr.of)
        else:
            yield from (expr.read(self.reader, window) for window in windows(expr.shape))

    def _block_quantized(self, expr: QuantizedPart) -> Iterator[Tensor]:
        key = (expr.of, expr.scheme)
        if expr.part == "data":
            kept = self.small_parts[key] = []
            for rows, _ in windows(expr.of.shape, QUANTIZED_ELEMENTS):
                quantized = expr.quantize(self.reader, rows)
                kept.append(replace(quantized, data=torch.empty(0)))  # a view would keep the data's memory
                yield expr.pick(quantized)
        else:
            last = expr.part == ("scales" if expr.scheme.symmetric else "zero_points")
            parts = self.small_parts.pop(key) if last else self.small_parts[key]
            yield from (expr.pick(quantized) for quantized in parts)

    def _transposed_int8(self, expr: RowQuantizedPart) -> Tensor:
        """A whole int8 matrix, a quarter of its float32 size: transposed windows would need every row's scale first."""
        data = torch.empty(expr.shape, dtype=torch.int8)
        kept = self.row_scales[expr.of] = []
        for (first, last), _ in windows(expr.of.shape, QUANTIZED_ELEMENTS):
            rows, scales = expr.quantize(self.reader, (first, last))
            data[:, first:last] = rows.T
            kept.append(scales)
        return data


def _ahead(blocks: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Compute the next block in a second thread while the caller hashes and writes the current one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, blocks, None)
        while (current := pending.result()) is not None:
            pending = pool.submit(next, blocks, None)
            yield current


def windows(shape: tuple[int, ...], elements: int = WINDOW_ELEMENTS) -> Iterator[Window]:
    """Cut a shape into whole-row windows of at most ``elements`` elements (at least one row)."""
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *whole(shape[1:]))
