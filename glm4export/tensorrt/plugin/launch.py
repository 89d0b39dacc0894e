"""Launch the kernels on torch tensors: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

Engines do not come through here; tests and ``tools/gpu_check.py`` do, and find what an engine would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4export.tensorrt.plugin import kernels
from glm4export.tensorrt.plugin.geometry import APPEND_ROWS, MAX_SPLITS, Geometry, Integers, split_sizes
from glm4export.tensorrt.plugin.tiles import Tile


def attention(
    geometry: Geometry,
    tile: Tile,
    qkv: Tensor,
    cache: tuple[Tensor, Tensor],
    position_ids: Tensor,
    write_indices: Tensor,
    attention_mask: Tensor,
    rotary: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    *,
    programs: int,
) -> Tensor:
    """Append to ``cache`` in place and attend to it; returns [batch, seq, num_heads * head_dim].

    qkv: [batch, seq, geometry.width]; cache: keys and values [batch, kv_heads, max_seq, head_dim]; position_ids: int64
    [batch, seq]; write_indices: int64 [batch]; attention_mask: bool [batch, 1, seq, max_seq]; rotary: cos and sin
    [max_seq, rotary_dim / 2]; scales: float32 [kv_heads] of keys and of values, read where the cache is int8.
    """
    batch, seq, _ = qkv.shape
    sizes = {"NUM_HEADS": geometry.num_heads, "KV_HEADS": geometry.kv_heads, "HEAD_DIM": geometry.head_dim}
    positional = {"ROTARY_DIM": geometry.rotary_dim, "MAX_SEQ": geometry.max_seq}
    kernels.append[Integers.cdiv(seq, APPEND_ROWS), geometry.kv_heads, batch](
        qkv, *cache, position_ids, write_indices, *rotary, *scales, seq, *cache,
        **sizes, **positional, BLOCK_M=APPEND_ROWS,
    )  # fmt: skip
    splits, rows = split_sizes(batch, seq, geometry.kv_heads, geometry.group, programs, Integers())
    attended = torch.empty(batch, seq, geometry.num_heads * geometry.head_dim, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty(
        batch, geometry.kv_heads, splits, rows, geometry.head_dim, dtype=torch.float32, device=qkv.device
    )
    lse = torch.empty(batch, geometry.kv_heads, splits, rows, dtype=torch.float32, device=qkv.device)
    kernels.attend[Integers.cdiv(seq * geometry.group, tile.block_m), splits, batch * geometry.kv_heads](
        qkv, *cache, position_ids, write_indices, attention_mask, *rotary, *scales,
        seq, splits, rows, attended, partial, lse,
        **sizes, **positional, SCALE=geometry.scale, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    kernels.combine[rows, geometry.kv_heads, batch](
        attended, partial, lse, seq, splits, rows, attended, **sizes, MAX_SPLITS=MAX_SPLITS
    )
    return attended
