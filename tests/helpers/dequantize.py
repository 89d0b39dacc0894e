"""What a kernel makes of blocks that :mod:`glm4export.weights.quantize` made."""

from __future__ import annotations

from torch import Tensor

from glm4export.weights.quantize import Quantized, Scheme, unpack


def dequantize(quantized: Quantized, scheme: Scheme) -> Tensor:
    """The weights that a kernel computes with, float32 [rows, columns]."""
    rows, blocks = quantized.scales.shape
    q = unpack(quantized.data.flatten(1), scheme.bits, blocks * scheme.block).view(rows, blocks, scheme.block)
    zero_points: float | Tensor = float(2 ** (scheme.bits - 1))
    if quantized.zero_points is not None:
        zero_points = unpack(quantized.zero_points, scheme.bits, blocks)[..., None].float()
    return q.float().sub_(zero_points).mul_(quantized.scales[..., None]).view(rows, -1)
