"""Keep fp16 activations finite by exact powers of two.

Real GLM-4-0414 activations pass fp16's largest number, 65504. But every block's output goes through an RMSNorm before
it joins the residual stream, and ``RMSNorm(s·x; eps·s²) = RMSNorm(x; eps)``: scaling the branch by a power of two and
the norm's eps by its square changes nothing but the exponent. The residual stream itself is scaled alike: the embedding
and the post-norm weights by r, and by r² the eps of the norms that read it.
"""

from __future__ import annotations

import re
from functools import partial

import onnx_ir as ir
import torch

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.weights.fp16 import Fp16Scales
from glm4export.weights.recipes import Recipe, Scale, map_sources
from glm4runtime.contract import UserError

_LAYER = r"model\.layers\.\d+\."


def _promised(skeleton: Skeleton, scales: Fp16Scales) -> Counts:
    layers, branch, residual = skeleton.config.num_hidden_layers, scales.branch != 1, scales.residual != 1
    return {
        "weights": 2 * layers * branch + (2 * layers + 1) * residual,  # gate_up and o; post-norms and embedding
        "eps": 2 * layers * branch + (2 * layers + 1) * residual,  # post-norms'; the other norms', the last one's too
    }


@counts(_promised)
def rescale_fp16(skeleton: Skeleton, scales: Fp16Scales) -> Counts:
    """Counts: ``weights`` whose recipe was scaled, ``eps`` changed. A scale of 1 changes nothing and counts nothing."""
    up_start = skeleton.config.intermediate_size
    weight_rules = (
        (_LAYER + r"mlp\.gate_up_proj\.weight", scales.branch, up_start),  # up only: the gate feeds the activation
        (_LAYER + r"self_attn\.o_proj\.weight", scales.branch, 0),
        (_LAYER + r"post_(self_attn|mlp)_layernorm\.weight", scales.residual, 0),
        (r"model\.embed_tokens\.weight", scales.residual, 0),
    )
    eps_rules = (
        (_LAYER + r"post_(self_attn|mlp)_layernorm\.weight", scales.branch**2),
        (_LAYER + r"(input|post_attention)_layernorm\.weight|model\.norm\.weight", scales.residual**2),
    )
    weights = eps = 0
    for name, recipe in skeleton.recipes.items():
        for pattern, factor, start in weight_rules:
            if factor != 1 and re.fullmatch(pattern, name):
                expr = map_sources(recipe.expr, partial(Scale, factor=factor, start=start))
                skeleton.recipes[name] = Recipe(expr, recipe.dtype)
                weights += 1
    for node in skeleton.nodes("RMSNormalization"):
        (weight,) = skeleton.weights_of(node)
        for pattern, factor in eps_rules:
            if factor != 1 and re.fullmatch(pattern, weight):
                scaled = node.attributes["epsilon"].as_float() * factor
                if scaled < torch.finfo(torch.float32).tiny:
                    raise UserError(
                        f"{weight}: rms_norm_eps={skeleton.config.rms_norm_eps} scaled by {factor:.3g}, to keep fp16 "
                        "finite, is nothing in float32; build with --precision bf16 or fp32"
                    )
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", scaled)
                eps += 1
    return {"weights": weights, "eps": eps}
