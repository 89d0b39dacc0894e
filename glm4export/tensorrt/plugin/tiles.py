"""Tile sizes of the attend kernel: candidates in order of preference, of which the first that fits is taken.

Which fits is known when it's compiled: Hopper and data-centre Blackwell keep operands of their matrix units in shared
memory, where others keep them in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm4export.tensorrt.plugin.geometry import Geometry

# What a block may take of shared memory without cuFuncSetAttribute. Nothing tells whether TensorRT makes that call for
# an AOT plugin's kernel, so none of ours needs it, on no device.
SHARED_LIMIT = 48 * 1024

# Bytes that a block may take at most, with that call (CUDA programming guide, table of compute capabilities)
DEVICE_SHARED = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
CAPABILITIES = tuple(DEVICE_SHARED)


@dataclass(frozen=True)
class Tile:
    """Queries and cache rows that a program holds at once, its warps, and how many blocks it has under way."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def decode_tiles(geometry: Geometry) -> tuple[Tile, ...]:
    """Tiles for one new token, or a few: the fewest rows that a matrix unit takes and the group fits in."""
    rows = 16 if geometry.group <= 16 else 32
    return tuple(Tile(rows, block, 4, stages) for block, stages in ((64, 3), (64, 2), (32, 2)))


def prefill_tiles(geometry: Geometry) -> tuple[Tile, ...]:
    """Tiles for many new tokens."""
    del geometry  # the same for all: what differs is which of them fits
    return tuple(Tile(64, block, 4, stages) for block, stages in ((64, 2), (32, 2), (64, 1), (32, 1)))
