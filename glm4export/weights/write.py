"""The streaming writer of weights.bin: recipes in, one aligned file out, a window at a time.

Peak memory is a few windows, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from glm4export.terminal.progress import Progress
from glm4export.weights.quantize import pack_signed
from glm4export.weights.recipes import Expr, QuantizedPart, Recipe, RowQuantizedPart
from glm4export.weights.tensors import Tensors, Window, whole
from glm4runtime.contract import FileSpec, UserError

ALIGNMENT = 4096  # bytes; a page, so that every tensor can be mapped on its own
WINDOW_ELEMENTS = 1 << 24  # 64 MiB as float32
QUANTIZED_ELEMENTS = 1 << 23  # weights quantized at a time


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
    path: Path, recipes: Mapping[str, Recipe], layout: Layout, reader: Tensors, progress: Progress
) -> FileSpec:
    """Evaluate every recipe into ``path``; returns its size and sha256, taken while writing.

    Raises WeightError where a value isn't finite in the stored dtype, naming the tensor; OSError where the disk fails.
    """
    digest, position = hashlib.sha256(), 0
    with path.open("wb") as file:
        for name, block in _ahead(_blocks(recipes, _Evaluator(reader, path.parent))):
            # as_strided: a single element's stride may be anything, and view wants 1
            data = block.as_strided((block.numel(),), (1,)).view(torch.uint8).numpy().data
            for piece in (b"\0" * max(0, layout.offsets[name] - position), data):
                file.write(piece)
                digest.update(piece)
                position += len(piece)
            progress(len(data))
    return FileSpec(position, digest.hexdigest())


def _blocks(recipes: Mapping[str, Recipe], evaluator: _Evaluator) -> Iterator[tuple[str, Tensor]]:
    """Every recipe's windows in file order, in their stored dtype."""
    for name, recipe in recipes.items():
        try:
            for block in evaluator.blocks(recipe.expr):
                block = block.to(recipe.torch_dtype).contiguous()
                if block.is_floating_point() and not torch.isfinite(block).all():
                    raise ValueError(f"a value is not finite in {recipe.dtype}")
                yield name, pack_signed(block) if recipe.dtype == "int4" else block
        except ValueError as error:
            raise WeightError(f"{name}: {error}; {_why(recipe)}") from None


def _why(recipe: Recipe) -> str:
    if recipe.dtype == "float32":  # which holds every finite number of a checkpoint
        return "the checkpoint holds NaN or infinity there; fetch or save it again"
    return "the checkpoint holds NaN or numbers beyond its range. Build with --precision fp32"


class _Evaluator:
    """Evaluates expressions by windows, and each quantized matrix once.

    With its data come scales and zero points, which are stored behind it: they are kept until their turn, each in one
    tensor. (Kept window by window they would lie between the freed memory of larger tensors, and hold it.)
    ``scratch``: a folder for a file the size of one matrix.
    """

    def __init__(self, reader: Tensors, scratch: Path) -> None:
        self.reader, self.scratch = reader, scratch
        self.kept: dict[QuantizedPart | RowQuantizedPart, Tensor] = {}

    def blocks(self, expr: Expr) -> Iterator[Tensor]:
        """The expression's windows, in order."""
        if not isinstance(expr, QuantizedPart | RowQuantizedPart):
            yield from (expr.read(self.reader, window) for window in windows(expr.shape))
        elif expr in self.kept:
            yield self.kept.pop(expr)
        elif isinstance(expr, RowQuantizedPart) or expr.layout == "transposed":
            yield from self._transposed(expr)
        else:
            yield from self._block_quantized(expr)

    def _block_quantized(self, expr: QuantizedPart) -> Iterator[Tensor]:
        scales, zero_points = (QuantizedPart(expr.of, expr.scheme, part) for part in ("scales", "zero_points"))
        self.kept[scales] = torch.empty(scales.shape)
        if not expr.scheme.symmetric:
            self.kept[zero_points] = torch.empty(zero_points.shape, dtype=torch.uint8)
        for (first, last), _ in windows(expr.of.shape, QUANTIZED_ELEMENTS):
            quantized = expr.quantize(self.reader, (first, last))
            self.kept[scales][first:last] = quantized.scales
            if quantized.zero_points is not None:
                self.kept[zero_points][first:last] = quantized.zero_points
            yield expr.pick(quantized)

    def _transposed(self, expr: QuantizedPart | RowQuantizedPart) -> Iterator[Tensor]:
        """Windows of an integer matrix stored transposed.

        Each of them has a column of every row, and a row's columns are known once its scales are, some by the whole
        row. So the matrix takes a detour over a file: quantized by windows of rows, each written transposed, and read
        back by windows of columns, of which every window of rows holds its part in one run.
        """
        columns, rows = expr.shape
        tiles = [window[0] for window in windows(expr.of.shape, QUANTIZED_ELEMENTS)]
        scales = replace(expr, part="scales")
        kept = self.kept[scales] = torch.empty(scales.shape)
        step = max(2, QUANTIZED_ELEMENTS // rows // 2 * 2)  # even, so that a window of int4 ends on a whole byte
        with TemporaryFile(dir=self.scratch) as file:
            for first, last in tiles:
                quantized, kept[..., first:last] = expr.transposed(self.reader, (first, last))
                file.write(quantized.contiguous().numpy().data.cast("B"))
            for start in range(0, columns, step):
                stop = min(start + step, columns)
                block = torch.empty(stop - start, rows, dtype=torch.int8)
                for first, last in tiles:
                    height = last - first
                    file.seek(first * columns + start * height)
                    part = np.fromfile(file, np.int8, (stop - start) * height)
                    block[:, first:last] = torch.from_numpy(part).view(-1, height)
                yield block


def _ahead(blocks: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Compute the next block in a second thread while the caller hashes and writes the current one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, blocks, None)
        while (current := pending.result()) is not None:
            pending = pool.submit(next, blocks, None)
            yield current


def windows(shape: tuple[int, ...], elements: int = WINDOW_ELEMENTS) -> Iterator[Window]:
    """Cut a shape into whole-row windows of at most ``elements`` elements (at least one row)."""
    if not shape:
        yield ()
        return
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *whole(shape[1:]))
