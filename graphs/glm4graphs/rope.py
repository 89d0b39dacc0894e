"""Rotary tables, in the same fp32 arithmetic as Hugging Face, so that long positions round alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm4graphs.config import Glm4Config, YarnScaling


def inverse_frequencies(config: Glm4Config) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [rotary_dim / 2], and the factor that scales cos and sin."""
    rope, dim = config.rope, config.rotary_dim
    frequencies = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.yarn is not None:
        return _yarn(frequencies, rope.theta, dim, rope.yarn)
    return 1.0 / frequencies / rope.linear_factor, 1.0


def rotary_tables(config: Glm4Config, positions: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles from ``first`` on, each float32 [positions - first, rotary_dim / 2]."""
    inverse, scale = inverse_frequencies(config)
    angles = torch.arange(first, positions).float()[:, None] * inverse
    return angles.cos() * scale, angles.sin() * scale


def _yarn(frequencies: Tensor, theta: float, dim: int, yarn: YarnScaling) -> tuple[Tensor, float]:
    """YaRN, section 3.2 and 3.4: interpolate slow dims by ``factor``, keep fast ones, ramp linearly in between."""

    def dim_of(rotations: float) -> float:  # the dim whose wave turns this often over the original context
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(yarn.beta_fast), dim_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # Hugging Face's guard against dividing by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    inverse = 1.0 / (yarn.factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep
    return inverse, _yarn_attention_factor(yarn)


def _yarn_attention_factor(yarn: YarnScaling) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * weight * math.log(yarn.factor) + 1.0

    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.mscale) / mscale(yarn.mscale_all_dim)
    return mscale(1.0)
