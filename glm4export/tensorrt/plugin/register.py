"""Register the kernels with TensorRT as quickly deployable plugins, compiled ahead of time.

Must run before a graph that :mod:`~glm4export.tensorrt.plugin.graph` rewrote is parsed; the engine built from it needs
neither this module nor Python. TensorRT's decorators read annotations as objects, hence no ``annotations`` future here.

Never run inside full TensorRT: docs/status.md. Tests drive the Python half of these decorators, which is TensorRT's
own, with a stand-in for the native half behind it.
"""

from enum import IntEnum
from typing import Any

from glm4export.tensorrt.plugin.aot import Kernel, append_kernel, attend_kernel, combine_kernel
from glm4export.tensorrt.plugin.geometry import APPEND_ROWS, Geometry, split_sizes
from glm4export.tensorrt.plugin.graph import APPEND, ATTEND, COMBINE, NAMESPACE
from glm4export.tensorrt.plugin.tiles import decode_tiles, prefill_tiles
from glm4runtime.contract import UserError


class Tactic(IntEnum):
    """Tiles that TensorRT times against each other, for each optimization profile by itself."""

    DECODE = 1
    PREFILL = 2


def register(capability: int, *, aliased: bool = True) -> None:
    """Make the plugins known to TensorRT's registry, once per process.

    ``capability``, such as 89, is the device's that the engine is for. ``aliased``: tell TensorRT that an updated cache
    is the cache; it may keep a copy, or refuse. Otherwise it's an output like any other, and is the cache only because
    both are bound to one address, which TensorRT must then let the kernel write to. Raises UserError for a
    capability that the kernels aren't made for.
    """
    import tensorrt as trt
    import tensorrt.plugin as trtp

    names = {trt.float16: "float16", trt.bfloat16: "bfloat16", trt.int8: "int8", trt.float32: "float32"}
    tokens = {
        trt.float16: "FP16", trt.bfloat16: "BF16", trt.int8: "INT8", trt.float32: "FP32", trt.int64: "INT64",
        trt.bool: "BOOL",
    }  # fmt: skip
    Desc = trtp.TensorDesc
    Launch = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def geometry_of(qkv: Any, cache: Any, cos: Any, scale: float) -> Geometry:
        _, kv_heads, max_seq, head_dim = cache.shape
        return Geometry(
            num_heads=qkv.shape[2] // head_dim - 2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim,
            rotary_dim=2 * cos.shape[1], max_seq=max_seq, scale=scale,
            dtype=names[qkv.dtype], cache_dtype=names[cache.dtype],
        )  # fmt: skip

    def launch(kernel: Kernel, grid: tuple[Any, Any, Any], scalars: list[Any]) -> Any:
        grid_x, grid_y, grid_z = grid
        params = trtp.KernelLaunchParams(
            grid_x=grid_x, grid_y=grid_y, grid_z=grid_z, block_x=kernel.threads, shared_mem=kernel.shared
        )
        extra = trtp.SymIntExprs(len(scalars))
        for index, scalar in enumerate(scalars):
            extra[index] = trtp.SymInt32(scalar)
        return kernel.name, kernel.ptx, params, extra

    @trtp.register(f"{NAMESPACE}::{APPEND}")
    def describe_append(
        qkv: Desc, past_key: Desc, past_value: Desc, position_ids: Desc, write_indices: Desc, cos: Desc, sin: Desc,
        key_scale: Desc, value_scale: Desc,
    ) -> tuple[Desc, Desc]:  # fmt: skip
        return (past_key.aliased(), past_value.aliased()) if aliased else (past_key.like(), past_value.like())

    @trtp.aot_impl(f"{NAMESPACE}::{APPEND}")
    def compile_append(
        qkv: Desc, past_key: Desc, past_value: Desc, position_ids: Desc, write_indices: Desc, cos: Desc, sin: Desc,
        key_scale: Desc, value_scale: Desc, outputs: tuple[Desc], tactic: int,
    ) -> Launch:  # fmt: skip
        geometry = geometry_of(qkv, past_key, cos, scale=1.0)
        batch, seq, _ = qkv.shape_expr
        grid = (trtp.cdiv(seq, APPEND_ROWS), geometry.kv_heads, batch)
        return launch(append_kernel(geometry, capability), grid, [seq])

    @trtp.register(f"{NAMESPACE}::{ATTEND}")
    def describe_attend(
        qkv: Desc, key_cache: Desc, value_cache: Desc, position_ids: Desc, write_indices: Desc, attention_mask: Desc,
        cos: Desc, sin: Desc, key_scale: Desc, value_scale: Desc, num_heads: int, kv_num_heads: int, head_dim: int,
        scale: float, programs: int,
    ) -> tuple[Desc, Desc, Desc]:  # fmt: skip
        batch, seq, _ = qkv.shape_expr
        splits, rows = split_sizes(batch, seq, kv_num_heads, num_heads // kv_num_heads, programs, trtp)
        return (
            trtp.from_shape_expr((batch, seq, num_heads * head_dim), qkv.dtype),
            trtp.from_shape_expr((batch, kv_num_heads, splits, rows, head_dim), trt.float32),
            trtp.from_shape_expr((batch, kv_num_heads, splits, rows), trt.float32),
        )

    @trtp.autotune(f"{NAMESPACE}::{ATTEND}")
    def tune_attend(
        qkv: Desc, key_cache: Desc, value_cache: Desc, position_ids: Desc, write_indices: Desc, attention_mask: Desc,
        cos: Desc, sin: Desc, key_scale: Desc, value_scale: Desc, outputs: tuple[Desc],
    ) -> list[trtp.AutoTuneCombination]:  # fmt: skip
        descs = (
            qkv, key_cache, value_cache, position_ids, write_indices, attention_mask, cos, sin, key_scale, value_scale,
            *outputs,
        )  # fmt: skip
        types = ", ".join(tokens[desc.dtype] for desc in descs)
        return [trtp.AutoTuneCombination(types, "LINEAR", [int(tactic) for tactic in Tactic])]

    # TensorRT passes every attribute, also those that an implementation has no use for
    @trtp.aot_impl(f"{NAMESPACE}::{ATTEND}")
    def compile_attend(
        qkv: Desc, key_cache: Desc, value_cache: Desc, position_ids: Desc, write_indices: Desc, attention_mask: Desc,
        cos: Desc, sin: Desc, key_scale: Desc, value_scale: Desc, num_heads: int, kv_num_heads: int, head_dim: int,
        scale: float, programs: int, outputs: tuple[Desc], tactic: int,
    ) -> Launch:  # fmt: skip
        geometry = geometry_of(qkv, key_cache, cos, scale)
        # TensorRT hands attributes over by place: two that changed theirs would compute something else, silently
        told, found = (num_heads, kv_num_heads, head_dim), (geometry.num_heads, geometry.kv_heads, geometry.head_dim)
        if told != found:
            raise UserError(
                f"attention plugin: num_heads, kv_num_heads, head_dim are {told}, the tensors' shapes say {found}; "
                "please report this, and build with --attention standard"
            )
        tiles = (prefill_tiles if tactic == Tactic.PREFILL else decode_tiles)(geometry)
        kernel = attend_kernel(geometry, capability, tiles)
        assert kernel.tile is not None
        batch, seq, _ = qkv.shape_expr
        splits, rows = split_sizes(batch, seq, kv_num_heads, geometry.group, programs, trtp)
        grid = (trtp.cdiv(seq * geometry.group, kernel.tile.block_m), splits, batch * kv_num_heads)
        return launch(kernel, grid, [seq, splits, rows])

    @trtp.register(f"{NAMESPACE}::{COMBINE}")
    def describe_combine(attended: Desc, partial: Desc, lse: Desc) -> Desc:
        return attended.aliased()

    @trtp.aot_impl(f"{NAMESPACE}::{COMBINE}")
    def compile_combine(attended: Desc, partial: Desc, lse: Desc, outputs: tuple[Desc], tactic: int) -> Launch:
        _, kv_heads, _, _, head_dim = partial.shape
        geometry = Geometry(
            num_heads=attended.shape[2] // head_dim, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim,
            max_seq=1, scale=1.0, dtype=names[attended.dtype], cache_dtype=names[attended.dtype],
        )  # fmt: skip
        batch, seq, _ = attended.shape_expr
        splits, rows = partial.shape_expr[2], partial.shape_expr[3]
        return launch(combine_kernel(geometry, capability), (rows, kv_heads, batch), [seq, splits, rows])

    del describe_append, compile_append, describe_attend, tune_attend, compile_attend, describe_combine, compile_combine
