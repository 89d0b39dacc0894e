"""Powers of two that keep fp16 activations finite, from what a checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm4export.weights.storage import EMBEDDING
from glm4export.weights.tensors import Tensors
from glm4export.weights.write import windows
from glm4graphs.config import Glm4Config

BRANCH_SCALE = 2.0**-7  # takes a branch output of 1e6 to 7.8e3 and leaves ordinary ones clear of fp16's subnormals
_FP16_HEADROOM = 2.0**15  # half of fp16's range: what the bound on the residual stream may reach


@dataclass(frozen=True)
class Fp16Scales:
    """Powers of two that keep fp16 activations finite; see :mod:`glm4export.passes.rescale_fp16`."""

    branch: float  # on the up half of gate_up_proj and on o_proj
    residual: float  # on the residual stream


def fp16_scales(config: Glm4Config, checkpoint: Tensors) -> Fp16Scales:
    """Powers of two for :mod:`glm4export.passes.rescale_fp16`.

    The residual scale is proven, not guessed. An RMSNorm's output is at most ``sqrt(hidden) * |weight|``, so the stream
    never passes ``max|embedding| + sum over post-norms of sqrt(hidden) * max|weight|``; it is scaled only when that
    bound leaves fp16's range. The branch outputs have no useful bound; they get a fixed scale.
    """
    bound = _largest(checkpoint, EMBEDDING)
    for layer in range(config.num_hidden_layers):
        for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            bound += math.sqrt(config.hidden_size) * _largest(checkpoint, f"model.layers.{layer}.{norm}.weight")
    residual = 2.0 ** min(0, math.floor(math.log2(_FP16_HEADROOM / bound))) if math.isfinite(bound) and bound else 1.0
    return Fp16Scales(branch=BRANCH_SCALE, residual=residual)


def _largest(checkpoint: Tensors, name: str) -> float:
    """The largest magnitude in a tensor, read a window at a time."""
    shape = checkpoint.tensors[name].shape
    return max(float(checkpoint.read(name, window).abs().max()) for window in windows(shape))
