"""Triton kernels run on a CPU by its interpreter, in a process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted; other tests compile them.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from glm4export.tensorrt.plugin.geometry import APPEND_ROWS, MAX_SPLITS, Geometry
from glm4export.tensorrt.plugin.tiles import Tile
from tools.plugin_runs.launch import Grid


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A pool of one process whose functions find Triton's kernels interpreted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()  # the process starts with its first job
        yield pool


class Interpreted:
    """A launcher of the kernels on CPU tensors, inside that pool."""

    def __init__(self, geometry: Geometry, tile: Tile) -> None:
        self.tile = tile
        sizes = {"NUM_HEADS": geometry.num_heads, "KV_HEADS": geometry.kv_heads, "HEAD_DIM": geometry.head_dim}
        positional = {**sizes, "ROTARY_DIM": geometry.rotary_dim, "MAX_SEQ": geometry.max_seq}
        blocks: dict[str, float] = {"SCALE": geometry.scale, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        self._constants: dict[str, dict[str, float]] = {
            "append": {**positional, "BLOCK_M": APPEND_ROWS},
            "attend": {**positional, **blocks},
            "combine": {**sizes, "MAX_SPLITS": MAX_SPLITS},
        }

    def __call__(self, kernel: str, grid: Grid, arguments: Sequence[Tensor | int]) -> None:
        from glm4export.tensorrt.plugin import kernels

        getattr(kernels, kernel)[grid](*arguments, **self._constants[kernel])


def _prepare() -> None:
    """Mend the interpreter's bfloat16: it keeps bits, which its matrix products and casts from int8 take as numbers."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    product = InterpreterBuilder.create_dot

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return product(self, widen(a), widen(b), *rest)

    def create_si_to_fp(self: InterpreterBuilder, source: TensorHandle, kind: Any) -> TensorHandle:
        if kind.scalar == tl.bfloat16:
            source = self.cast_impl(source, tl.float32)
        return self.cast_impl(source, kind)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_si_to_fp = create_si_to_fp
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy on exp2 of -inf - -inf, behind masks
