"""How each weight is stored where it is quantized: decided here, once, for passes, calibration and estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from glm4export.weights.quantize import Scheme, block_for
from glm4export.weights.widths import Bits, BlockSize

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE, SCORE_BIAS = "score.weight", "score.bias"  # of classifiers: a few rows, never quantized
SCALE_DTYPE = torch.float16


@dataclass(frozen=True)
class Formats:
    """How a quantizing pipeline stores weights."""

    linear_bits: Bits
    head_bits: Bits
    embedding_bits: Bits
    block: BlockSize  # preferred; a weight whose columns it doesn't divide gets the largest block that does
    symmetric: bool
    qdq: bool = False  # for DequantizeLinear: int4 blocks with scales above zero, int8 with one scale per row

    def bits(self, name: str) -> int:
        """Bits of a weight, by the checkpoint's name: 4, 8, or 16 for float16."""
        return {EMBEDDING: self.embedding_bits, HEAD: self.head_bits, SCORE: 16}.get(name, self.linear_bits)

    def scheme(self, name: str, columns: int) -> Scheme | None:
        """How a matrix with that many columns is quantized by blocks; None for float16, and for one scale per row."""
        bits = self.bits(name)
        if bits == 16 or (self.qdq and bits == 8):
            return None
        return Scheme(bits, block_for(columns, self.block), self.symmetric, SCALE_DTYPE, positive=self.qdq)

    def nbytes(self, name: str, rows: int, columns: int) -> int:
        """Bytes of a stored matrix, scales and zero points included."""
        bits, scheme = self.bits(name), self.scheme(name, columns)
        if bits == 16:
            return 2 * rows * columns
        blocks = 1 if scheme is None else columns // scheme.block
        zero_points = 0 if scheme is None or scheme.symmetric else math.ceil(blocks * bits / 8)
        return rows * (columns * bits // 8 + blocks * SCALE_DTYPE.itemsize + zero_points)
