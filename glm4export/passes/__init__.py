"""The passes, one per file, and the ordered list that each target and precision runs.

A pass takes a skeleton, rewrites its nodes and recipes in place, and returns what it counted. Counts follow from the
config, the options and the passes before: every pass states its own, and another one is an error (:class:`Pass`).
"""

from __future__ import annotations

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, Pass
from glm4export.passes.dequantize_linears import dequantize_linears
from glm4export.passes.fuse_qkv import fuse_qkv
from glm4export.passes.lift_weights import lift_weights
from glm4export.passes.lower_attention_gqa import lower_attention_gqa
from glm4export.passes.lower_attention_plugin import lower_attention_plugin
from glm4export.passes.lower_attention_standard import lower_attention_standard
from glm4export.passes.quantize_cache import quantize_cache
from glm4export.passes.quantize_embedding import quantize_embedding
from glm4export.passes.quantize_fp8 import quantize_fp8
from glm4export.passes.quantize_linears import quantize_linears
from glm4export.passes.quantize_rows import quantize_rows
from glm4export.passes.rescale_fp16 import rescale_fp16
from glm4export.passes.simplify import simplify
from glm4export.passes.widen_cache import widen_cache
from glm4runtime.contract import DECODE, PREFILL

ORT_FP32: tuple[Pass, ...] = (lift_weights, fuse_qkv, lower_attention_gqa, simplify)
ORT_FP16: tuple[Pass, ...] = (lift_weights, rescale_fp16, fuse_qkv, lower_attention_gqa, simplify)

_QUANTIZE: tuple[Pass, ...] = (quantize_linears, quantize_embedding)
ORT_INT_FP32: tuple[Pass, ...] = (lift_weights, fuse_qkv, *_QUANTIZE, lower_attention_gqa, simplify)
ORT_INT_FP16: tuple[Pass, ...] = (lift_weights, rescale_fp16, fuse_qkv, *_QUANTIZE, lower_attention_gqa, simplify)

# Prefill's own formats, chosen by --prefill-precision; the head and the embedding stay those of the bundle.
PREFILL_INT8: tuple[Pass, ...] = (lift_weights, fuse_qkv, quantize_rows, *_QUANTIZE, lower_attention_gqa, simplify)

TRT_FP32: tuple[Pass, ...] = (lift_weights, fuse_qkv, lower_attention_standard, simplify)
TRT_FP16: tuple[Pass, ...] = (lift_weights, rescale_fp16, fuse_qkv, lower_attention_standard, simplify)
TRT_INT: tuple[Pass, ...] = (
    lift_weights, rescale_fp16, fuse_qkv, dequantize_linears, lower_attention_standard, simplify,
)  # fmt: skip

# dequantize_linears finds only the head left: fp8 linears hold no stored weight of the checkpoint's dtype any more
TRT_FP8: tuple[Pass, ...] = (
    lift_weights, rescale_fp16, fuse_qkv, quantize_fp8, dequantize_linears, lower_attention_standard, simplify,
)  # fmt: skip

# --attention plugin; the optimizer runs before, since it would put the function's body into its nodes' places
TRT_PLUGIN_FP16: tuple[Pass, ...] = (lift_weights, rescale_fp16, fuse_qkv, simplify, lower_attention_plugin)
TRT_PLUGIN_BF16: tuple[Pass, ...] = (lift_weights, fuse_qkv, simplify, lower_attention_plugin)
TRT_PLUGIN_INT: tuple[Pass, ...] = (
    lift_weights, rescale_fp16, fuse_qkv, dequantize_linears, simplify, lower_attention_plugin,
)  # fmt: skip
PLUGIN: dict[str, tuple[Pass, ...]] = {
    "fp16": TRT_PLUGIN_FP16,
    "bf16": TRT_PLUGIN_BF16,
    **dict.fromkeys(("int8", "int4"), TRT_PLUGIN_INT),
}

PIPELINES: dict[tuple[str, str], tuple[Pass, ...]] = {
    ("cpu", "fp32"): ORT_FP32,
    ("cpu", "fp16"): ORT_FP16,
    ("cuda", "fp16"): ORT_FP16,
    ("cuda", "bf16"): ORT_FP32,  # bf16 has fp32's range: nothing to rescale
    **{("cpu", precision): ORT_INT_FP32 for precision in ("int8", "int4")},  # CPU kernels take fp32 activations
    **{("cuda", precision): ORT_INT_FP16 for precision in ("int8", "int4")},
    ("tensorrt", "fp32"): TRT_FP32,
    ("tensorrt", "fp16"): TRT_FP16,
    ("tensorrt", "bf16"): TRT_FP32,
    **{("tensorrt", precision): TRT_INT for precision in ("int8", "int4")},
    ("tensorrt", "fp8"): TRT_FP8,
}


# --kv-cache int8 puts one of these behind lower_attention_gqa. CPU kernels take float caches for many tokens at once.
INT8_CACHE: dict[tuple[str, str], Pass] = {
    ("cpu", PREFILL): widen_cache,
    ("cpu", DECODE): quantize_cache,
    ("cuda", PREFILL): quantize_cache,
    ("cuda", DECODE): quantize_cache,
}


def behind_lowering(pipeline: tuple[Pass, ...], step: Pass) -> tuple[Pass, ...]:
    """The same passes with one more, right behind the lowering of attention."""
    at = pipeline.index(lower_attention_gqa) + 1
    return (*pipeline[:at], step, *pipeline[at:])


def run(passes: tuple[Pass, ...], skeleton: Skeleton, *, skip_simplify: bool = False) -> dict[str, Counts]:
    """Run passes in order; returns each one's counts by its name. Raises InternalError where one isn't the promised."""
    return {step.name: step(skeleton) for step in passes if not (skip_simplify and step is simplify)}
