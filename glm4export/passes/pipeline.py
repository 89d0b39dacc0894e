"""The passes that a graph gets, in order: the compiler's one list of phases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from glm4export.passes.add_lora_slots import add_lora_slots
from glm4export.passes.counted import Pass
from glm4export.passes.dequantize_linears import dequantize_linears
from glm4export.passes.fuse_qkv import fuse_qkv
from glm4export.passes.fuse_residual_norms import fuse_residual_norms
from glm4export.passes.give_attentions import give_attentions
from glm4export.passes.give_hidden_states import give_hidden_states
from glm4export.passes.give_top_logits import give_top_logits
from glm4export.passes.lift_weights import lift_weights
from glm4export.passes.lower_attention_bias import lower_attention_bias
from glm4export.passes.lower_attention_full import lower_attention_full
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
from glm4export.passes.take_embeddings import take_embeddings
from glm4export.passes.widen_cache import widen_cache
from glm4export.weights.fp16 import Fp16Scales
from glm4export.weights.storage import Formats
from glm4runtime.contract import MODEL, PREFILL, TENSORRT, GraphName, Precision, Target


class Options(Protocol):
    """What decides about passes, of :class:`glm4export.build.options.BuildOptions`, which tells what is possible."""

    @property
    def target(self) -> Target: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def formats(self) -> Formats | None: ...
    @property
    def prefill_precision(self) -> str | None: ...
    @property
    def cache_dtype(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def lora_dtype(self) -> str | None: ...
    @property
    def simplify(self) -> bool: ...
    @property
    def inputs(self) -> str: ...
    @property
    def position_ids(self) -> bool: ...
    @property
    def output_hidden_states(self) -> bool: ...
    @property
    def output_attentions(self) -> bool: ...
    @property
    def output_top_logits(self) -> int | None: ...


def pipeline(options: Options, graph: GraphName, scales: Fp16Scales | None) -> Iterator[Pass]:
    """The passes of one graph with their arguments. ``scales`` where activations are fp16, which they keep finite."""
    formats, tensorrt = options.formats, options.target == TENSORRT

    yield lift_weights()
    if scales is not None:
        yield rescale_fp16(scales)
    residual = 1.0 if scales is None else scales.residual
    if options.inputs == "embeds":
        yield take_embeddings(residual)
    if options.output_hidden_states:
        yield give_hidden_states(residual)
    yield fuse_qkv()
    if options.lora_dtype is not None:
        yield add_lora_slots(options.lora_dtype)

    if graph == PREFILL and options.prefill_precision == "int8":  # the layers'; the head stays the bundle's
        yield quantize_rows()
    if options.precision == "fp8":  # likewise
        yield quantize_fp8(1.0 if scales is None else scales.branch)
    if formats is not None and tensorrt:
        yield dequantize_linears(formats)
    elif formats is not None:
        yield quantize_linears(formats, int8_activations=options.target == "cpu")
        if options.inputs == "ids":
            yield quantize_embedding(formats)

    if options.attention == "plugin":
        if options.simplify:  # before: it would put the function's body into its nodes' places
            yield simplify()
        yield lower_attention_plugin(quantized=options.cache_dtype == "int8")
        return
    if options.output_attentions if graph == MODEL else options.position_ids:
        yield lower_attention_bias(options.position_ids)
    elif graph == MODEL:
        yield lower_attention_full(options.position_ids)
    else:
        # Only our own runtime runs this graph of a GPU's; others know decode, by its mask
        lengths = (options.target, graph) == ("cuda", PREFILL)
        yield lower_attention_standard() if tensorrt else lower_attention_gqa(take_lengths=lengths)
    if options.output_attentions:
        yield give_attentions()
    if options.cache_dtype == "int8":
        # CPU kernels take float caches for many tokens at once
        yield widen_cache() if (options.target, graph) == ("cpu", PREFILL) else quantize_cache()
    if options.simplify:
        yield simplify()
    if options.target == "cuda":  # behind simplify, which would name the outputs that it leaves out
        yield fuse_residual_norms()
    if options.output_top_logits is not None and graph == PREFILL:  # as lengths above
        yield give_top_logits(options.output_top_logits)
