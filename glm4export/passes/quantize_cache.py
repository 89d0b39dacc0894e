"""Keep the KV cache in int8, one static step per channel: GroupQueryAttention reads and writes it as it is.

A new key or value is stored as ``clamp(round(x / step), -128, 127)``. Steps come from calibration and are weights like
any other, so that whoever runs the graph only sees a cache of another dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.terminal.errors import InternalError
from glm4export.weights.recipes import CacheScales, Recipe
from glm4runtime.contract import past_name

_PAST = {"key": 3, "value": 4}  # which inputs of GroupQueryAttention
_SCALES = {"key": 12, "value": 13}
_PRESENT = {"key": 1, "value": 2}  # which outputs


@dataclass(frozen=True)
class Int8Cache:
    """One of a layer's two caches: where its attention takes the past and gives the present, and its steps."""

    part: str
    input_index: int
    output_index: int
    scales: ir.Value  # float32 [kv_heads, 1, head_dim]


@counts(per_layer(caches=2))
def quantize_cache(skeleton: Skeleton) -> Counts:
    """Counts: ``caches``, two per layer, that are int8 now."""
    count = 0
    for attention, caches in int8_caches(skeleton):
        attention.resize_inputs(1 + max(_SCALES.values()))
        for cache in caches:
            attention.replace_input_with(_SCALES[cache.part], cache.scales)
            kind = f"{cache.part[0]}_quant_type"
            attention.attributes[kind] = ir.AttrString(kind, "PER_CHANNEL")
            count += 1
        attention.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    return {"caches": count}


def int8_caches(skeleton: Skeleton) -> Iterator[tuple[ir.Node, list[Int8Cache]]]:
    """Declare every layer's caches int8 at the graph's boundary and add their steps; yields each layer's attention."""
    for layer, attention in enumerate(skeleton.nodes("GroupQueryAttention", CONTRIB)):
        caches = []
        for part in ("key", "value"):
            past, present = attention.inputs[_PAST[part]], attention.outputs[_PRESENT[part]]
            if past is None or past.name != past_name(layer, part):
                raise InternalError(f"{attention.name}: its cache isn't {past_name(layer, part)}, as of layer {layer}")
            past.type = present.type = ir.TensorType(ir.DataType.INT8)
            recipe = Recipe(CacheScales(layer, part, skeleton.config), "float32")
            scales = skeleton.weight(f"model.layers.{layer}.self_attn.{part}_scales", recipe)
            caches.append(Int8Cache(part, _PAST[part], _PRESENT[part], scales))
        yield attention, caches
