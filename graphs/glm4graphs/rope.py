"""Rotary tables, in the same fp32 arithmetic as Hugging Face, so that long positions round alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm4graphs.config import (
    DynamicScaling,
    Glm4Config,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    YarnScaling,
)


def inverse_frequencies(config: Glm4Config) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [rotary_dim / 2], and the factor that scales cos and sin.

    For :attr:`Glm4Config.max_positions` positions at most: beyond them some rope types go by each run's length.
    """
    theta, dim, scaling = config.rope.theta, config.rotary_dim, config.rope.scaling
    frequencies = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match scaling:
        case YarnScaling():
            return _yarn(frequencies, theta, dim, scaling)
        case LongropeScaling():
            short = torch.tensor(scaling.short_factor, dtype=torch.float32)
            return 1.0 / (short * frequencies), _longrope_attention_factor(scaling)
        case LinearScaling():
            return 1.0 / frequencies / scaling.factor, 1.0
        case Llama3Scaling():
            return _llama3(1.0 / frequencies, scaling), 1.0
        case DynamicScaling() | None:
            return 1.0 / frequencies, 1.0


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


def _longrope_attention_factor(longrope: LongropeScaling) -> float:
    """LongRoPE as Phi-3 computes it, which the paper leaves open."""
    if longrope.attention_factor is not None:
        return longrope.attention_factor
    if longrope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(longrope.factor) / math.log(longrope.original_max_position_embeddings))


def _llama3(inverse: Tensor, llama3: Llama3Scaling) -> Tensor:
    """Waves longer than original / low are stretched, those shorter than original / high kept, the others blended."""
    original, low, high = llama3.original_max_position_embeddings, llama3.low_freq_factor, llama3.high_freq_factor
    lengths = 2 * math.pi / inverse
    long, short = lengths > original / low, lengths < original / high
    kept = (original / lengths - low) / (high - low)
    blended = (1 - kept) * inverse / llama3.factor + kept * inverse
    return torch.where(long, inverse / llama3.factor, torch.where(short, inverse, blended))
