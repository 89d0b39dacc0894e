"""Compile the kernels ahead of time, for any compute capability, on a machine without a GPU.

TensorRT takes a kernel's PTX and launches it with its plugin's inputs, scalars and outputs, and nothing else. Triton's
kernels have two pointers to scratch memory behind those, which ours don't use: they are taken out of the PTX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glm4export.tensorrt.plugin import kernels
from glm4export.tensorrt.plugin.geometry import APPEND_ROWS, MAX_SPLITS, Geometry
from glm4export.tensorrt.plugin.tiles import CAPABILITIES, SHARED_LIMIT, Tile
from glm4runtime.contract import UserError

# The oldest PTX that knows the device, for the oldest drivers; Triton's default is the newest that it has
_PTX_VERSIONS = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 120: 87}

_POINTERS = {
    **dict.fromkeys(("qkv", "cos", "sin", "attended", "combined"), "activations"),
    **dict.fromkeys(("past_key", "past_value", "key_cache", "value_cache", "present_key", "present_value"), "cache"),
    **dict.fromkeys(("position_ids", "write_indices"), "int64"),
    **dict.fromkeys(("key_scale", "value_scale", "partial", "lse"), "float32"),
    "attention_mask": "bool",
}
_SCALARS = ("seq", "splits", "rows")
_TRITON_NAMES = {
    "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int8": "*i8", "int64": "*i64", "bool": "*i1",
}  # fmt: skip
_ALIGNED = [["tt.divisibility", 16]]  # bytes: TensorRT's buffers are, and a cache's rows in a caller's pool


@dataclass(frozen=True)
class Kernel:
    """A kernel as TensorRT gets it, and the cubin that Triton's own ptxas made of it."""

    name: str
    ptx: str
    threads: int
    shared: int  # bytes per block
    tile: Tile | None
    cubin: bytes


def append_kernel(geometry: Geometry, capability: int) -> Kernel:
    """``append`` for one geometry and compute capability (such as 89 for 8.9)."""
    return _compile("append", geometry, capability, _Options(4, 1, (("BLOCK_M", APPEND_ROWS),)))


def combine_kernel(geometry: Geometry, capability: int) -> Kernel:
    """``combine`` for one geometry and compute capability."""
    return _compile("combine", geometry, capability, _Options(4, 1, (("MAX_SPLITS", MAX_SPLITS),)))


def attend_kernel(geometry: Geometry, capability: int, tiles: tuple[Tile, ...]) -> Kernel:
    """``attend`` with the first of ``tiles`` that needs no more shared memory than any launch may have."""
    for tile in tiles:
        blocks = (("BLOCK_M", tile.block_m), ("BLOCK_N", tile.block_n))
        kernel = _compile("attend", geometry, capability, _Options(tile.warps, tile.stages, blocks, tile))
        if kernel.shared <= SHARED_LIMIT:
            return kernel
    raise UserError(f"attention plugin: no tile of {geometry} fits {SHARED_LIMIT} bytes on sm_{capability}")


@dataclass(frozen=True)
class _Options:
    warps: int
    stages: int
    constants: tuple[tuple[str, int], ...]
    tile: Tile | None = None


@cache
def _compile(name: str, geometry: Geometry, capability: int, options: _Options) -> Kernel:
    if capability not in CAPABILITIES:
        raise UserError(
            f"attention plugin: compute capability {capability / 10} is not one of "
            f"{', '.join(str(known / 10) for known in CAPABILITIES)}; build with --attention standard"
        )
    function: Any = getattr(kernels, name)
    known = {
        "NUM_HEADS": geometry.num_heads, "KV_HEADS": geometry.kv_heads, "HEAD_DIM": geometry.head_dim,
        "ROTARY_DIM": geometry.rotary_dim, "MAX_SEQ": geometry.max_seq, "SCALE": geometry.scale,
        **dict(options.constants),
    }  # fmt: skip
    names: list[str] = function.arg_names
    constants = {argument: known[argument] for argument in names if argument in known}
    signature = {argument: _type_of(argument, geometry, constants) for argument in names}
    aligned = {(index,): _ALIGNED for index, argument in enumerate(names) if signature[argument].startswith("*")}
    # Line information would put this machine's paths into the engine
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(
            ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": options.warps, "num_stages": options.stages,
                "ptx_version": _PTX_VERSIONS[capability], "enable_fp_fusion": True,
            },
        )  # fmt: skip
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise AssertionError(f"{name} needs scratch memory, which TensorRT does not give it")
    parameters = sum(kind != "constexpr" for kind in signature.values())
    ptx = keep_parameters(compiled.asm["ptx"], metadata.name, parameters)
    return Kernel(metadata.name, ptx, metadata.num_warps * 32, metadata.shared, options.tile, compiled.asm["cubin"])


def keep_parameters(ptx: str, name: str, count: int) -> str:
    """Take the entry's parameters after the first ``count`` out of the PTX. They must not be read."""
    entry = re.search(rf"(\.entry {re.escape(name)}\(\n)(.*?)(\n\))", ptx, re.DOTALL)
    if entry is None:
        raise AssertionError(f"PTX without an entry {name}")
    parameters = entry[2].split(",\n")
    body = ptx[entry.end() :]
    for extra in parameters[count:]:
        if re.search(rf"\b{re.escape(extra.split()[-1])}\b", body):
            raise AssertionError(f"{name} reads {extra.strip()}, which TensorRT does not pass")
    return ptx[: entry.start()] + entry[1] + ",\n".join(parameters[:count]) + entry[3] + body


def _type_of(argument: str, geometry: Geometry, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in _SCALARS:
        return "i32"
    role = _POINTERS[argument]
    return _TRITON_NAMES[{"activations": geometry.dtype, "cache": geometry.cache_dtype}.get(role, role)]
