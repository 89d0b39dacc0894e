"""One attention layer by the plugin's kernels, on torch tensors, in the order and with the sizes of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from glm4export.tensorrt.plugin.geometry import APPEND_ROWS, split_sizes
from glm4export.tensorrt.plugin.tiles import Tile

from .reference import Case

Grid = tuple[int, int, int]


class Integers:
    """The launches' arithmetic with numbers."""

    max = staticmethod(max)
    min = staticmethod(min)
    ShapeExpr = int

    @staticmethod
    def cdiv(first: int, second: int) -> int:
        return -(-first // second)


class Launcher(Protocol):
    """Starts a kernel by its name; ``tile`` is that of its ``attend``."""

    tile: Tile

    def __call__(self, kernel: str, grid: Grid, arguments: Sequence[Tensor | int]) -> None: ...


def attention(launch: Launcher, case: Case, *, programs: int) -> Tensor:
    """Append to the case's cache in place and attend to it; returns [batch, seq, num_heads * head_dim]."""
    shape, seq, batch = case.geometry, case.qkv.shape[1], case.qkv.shape[0]
    placed = [case.position_ids, case.write_indices]
    tables = [case.cos, case.sin, case.key_scale, case.value_scale]
    cache = [case.keys, case.values]
    launch(
        "append",
        (Integers.cdiv(seq, APPEND_ROWS), shape.kv_heads, batch),
        [case.qkv, *cache, *placed, *tables, seq, *cache],
    )
    splits, rows = split_sizes(batch, seq, shape.kv_heads, shape.group, programs, Integers())
    attended = case.qkv.new_empty(batch, seq, shape.num_heads * shape.head_dim)
    partial = attended.new_empty(batch, shape.kv_heads, splits, rows, shape.head_dim, dtype=torch.float32)
    lse = attended.new_empty(batch, shape.kv_heads, splits, rows, dtype=torch.float32)
    launch(
        "attend",
        (Integers.cdiv(seq * shape.group, launch.tile.block_m), splits, batch * shape.kv_heads),
        [case.qkv, *cache, *placed, case.attention_mask, *tables, seq, splits, rows, attended, partial, lse],
    )
    launch("combine", (rows, shape.kv_heads, batch), [attended, partial, lse, seq, splits, rows, attended])
    return attended
