"""Keep attention one node, ``glm4::Attention``, for TensorRT's plugin, with its definition as a function beside it.

The node takes what the standard lowering's operators take (:class:`AttentionInputs`), and the model carries a local
function of its name made of exactly those operators: a runtime without the plugin runs that. TensorRT's parser must not
be shown the node: it looks operators up by name, whatever their domain, and reads a standard Attention into it. An
engine's graph is made by :mod:`glm4export.tensorrt.plugin.graph`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_standard import (
    OPSET,
    AttentionInputs,
    HeadShapes,
    attention_inputs,
    standard_attention,
    step_inputs,
)
from glm4export.weights.recipes import CacheScales, Recipe
from glm4graphs.attention import DOMAIN, OP_TYPE
from glm4graphs.config import Glm4Config

OUTPUTS = ("attended", "present_key", "present_value")
ATTRIBUTES = ("num_heads", "kv_num_heads", "scale")
_PAST = slice(3, 5)  # the traced node's inputs of the cache


def _promised(skeleton: Skeleton, *, quantized: bool = False) -> Counts:
    layers = skeleton.config.num_hidden_layers
    return {"attention": layers, "caches": 2 * layers * quantized}


@counts(_promised)
def lower_attention_plugin(skeleton: Skeleton, *, quantized: bool = False) -> Counts:
    """Counts: ``attention`` nodes, and ``caches`` that are int8 where ``quantized``, two per layer.

    The last pass: the optimizer would put the function's body in their places.
    """
    nodes = skeleton.nodes(OP_TYPE, DOMAIN)
    inputs = step_inputs(skeleton)
    caches = 0
    for layer, node in enumerate(nodes):
        attributes = {name: node.attributes[name].value for name in ATTRIBUTES}
        kept = list(attention_inputs(node, inputs)[:8])
        assert node.name is not None
        if quantized:
            kept += _int8_cache(skeleton, node, layer)
            caches += 2
        skeleton.replace(node, node.name, OP_TYPE, kept, attributes, domain=DOMAIN)
    function = attention_function(skeleton.config, quantized=quantized)
    skeleton.model.functions[function.identifier()] = function
    skeleton.model.opset_imports[""] = OPSET
    return {"attention": len(nodes), "caches": caches}


def _int8_cache(skeleton: Skeleton, node: ir.Node, layer: int) -> list[ir.Value]:
    """Declare a layer's cache int8 at the graph's boundary; returns its keys' and values' steps, float32 [kv_heads]."""
    past, present = node.inputs[_PAST], node.outputs[1:]
    for value in (*past, *present):
        assert value is not None
        value.type = ir.TensorType(ir.DataType.INT8)
    return [
        skeleton.weight(
            f"model.layers.{layer}.self_attn.{part}_scales",
            Recipe(CacheScales(layer, part, skeleton.config, by_head=True), "float32"),
        )
        for part in ("key", "value")
    ]


def attention_function(config: Glm4Config, *, quantized: bool = False) -> ir.Function:
    """``glm4::Attention`` as a function of standard operators, for one model's heads.

    Its inputs are those of :class:`AttentionInputs`; the last two only where ``quantized`` tells of an int8 cache,
    whose rows are symmetric int8 with one float32 scale for each kv head's keys and one for its values.
    """
    names = AttentionInputs._fields if quantized else AttentionInputs._fields[:8]
    inputs = AttentionInputs(*map(ir.val, names))
    nodes: list[ir.Node] = []

    def emit(
        name: str, op_type: str, inputs: Sequence[ir.Value | None], outputs: Sequence[str] = (), **attributes: Any
    ) -> Sequence[ir.Value]:
        values = [ir.val(output) for output in outputs or (name,)]
        nodes.append(ir.node(op_type, inputs, attributes, outputs=values, name=name))
        return nodes[-1].outputs

    def constant(name: str, values: list[int]) -> ir.Value:
        return emit(name, "Constant", [], value=ir.tensor(values, dtype=ir.DataType.INT64))[0]

    scale = ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT)
    results = standard_attention(emit, inputs, HeadShapes(config, constant), config.rotary_dim, scale)
    for value, name in zip(results, OUTPUTS, strict=True):
        value.name = name
    body = ir.Graph([value for value in inputs if value is not None], results, nodes=nodes, opset_imports={"": OPSET})
    kinds = {"num_heads": ir.AttributeType.INT, "kv_num_heads": ir.AttributeType.INT, "scale": ir.AttributeType.FLOAT}
    return ir.Function(
        DOMAIN, OP_TYPE, graph=body, attributes=[ir.Attr(name, kinds[name], None) for name in ATTRIBUTES]
    )
