"""What the plugin's kernels are made for, and how a launch is divided. No Triton, no TensorRT, no torch.

A launch's sizes are computed twice: with numbers, when kernels are launched from Python, and with TensorRT's symbolic
dimensions, when an engine is built. Both come from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError

HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP = 24  # query heads per kv head, GLM-4-32B's
ACTIVATIONS = ("float16", "bfloat16")
CACHES = (*ACTIVATIONS, "int8")

APPEND_ROWS = 16  # new tokens that one program of ``append`` writes
MAX_SPLITS = 64  # shares of one sequence; combine holds them all at once
_SPLIT_ROWS = 64  # queries that the count of programs assumes for a tile, whichever tile is launched


class Arithmetic(Protocol):
    """What launches are computed with: ``tensorrt.plugin`` has these names, for its symbolic dimensions."""

    def max(self, first: Any, second: Any) -> Any: ...
    def min(self, first: Any, second: Any) -> Any: ...
    def cdiv(self, first: Any, second: Any) -> Any: ...
    def ShapeExpr(self, value: int) -> Any: ...


@dataclass(frozen=True)
class Geometry:
    """One attention layer: what the kernels are compiled for. Raises UserError for what they don't take."""

    num_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    max_seq: int
    scale: float
    dtype: str = "float16"  # of queries, keys, values and rotary tables
    cache_dtype: str = "float16"

    @classmethod
    def of(cls, config: Glm4Config, max_seq_len: int, dtype: str, cache_dtype: str) -> Geometry:
        """The attention of a model that computes in ``dtype`` over such a cache, ONNX's spelling. Raises UserError."""
        return cls(
            num_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
            max_seq=max_seq_len,
            scale=config.head_dim**-0.5,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )

    def __post_init__(self) -> None:
        def require(holds: bool, what: str) -> None:
            if not holds:
                raise UserError(f"attention plugin: {what}; build with --attention standard")

        require(self.head_dim in HEAD_DIMS, f"head_dim={self.head_dim} is not one of {_listed(HEAD_DIMS)}")
        require(
            self.num_heads % self.kv_heads == 0 and self.group <= MAX_GROUP,
            f"{self.num_heads} heads on {self.kv_heads} kv heads are not in groups of 1 to {MAX_GROUP}",
        )
        require(
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim={self.rotary_dim} is not an even number up to head_dim={self.head_dim}",
        )
        require(
            self.dtype in ACTIVATIONS, f"activations in {self.dtype} are not supported, only {_listed(ACTIVATIONS)}"
        )
        require(
            self.cache_dtype in (self.dtype, "int8"),
            f"a cache in {self.cache_dtype} does not go with activations in {self.dtype}, only {self.dtype} or int8",
        )
        # Offsets inside one kv head's cache are 32-bit
        require(self.max_seq * self.head_dim < 2**31, f"max_seq={self.max_seq} is too long")

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of packed queries, keys and values."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_dim


def split_sizes(batch: Any, seq: Any, kv_heads: int, group: int, programs: int, ops: Arithmetic) -> tuple[Any, Any]:
    """How many shares each sequence's cache is attended to in, and the rows of queries that each keeps.

    ``programs`` is how many the device should be given: decoding one sequence would otherwise occupy 2 of a hundred
    processors. Prefill has enough without splits; its one share is complete, and keeps no rows (a dimension is at
    least 1).
    """
    queries = seq * group
    tiles = batch * kv_heads * ops.cdiv(queries, _SPLIT_ROWS)
    splits = ops.max(1, ops.min(MAX_SPLITS, ops.ShapeExpr(programs) // tiles))
    return splits, ops.max(1, ops.min(queries, (splits - 1) * queries))


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
