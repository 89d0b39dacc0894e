"""Lower ``glm4::Attention`` to ONNX Runtime's ``com.microsoft::GroupQueryAttention``, rotary inside it."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.weights.recipes import Recipe, RotaryTable
from glm4graphs.attention import DOMAIN, OP_TYPE
from glm4runtime.contract import ATTENTION_MASK, UserError

CONTRIB = "com.microsoft"
_HEAD_COLUMNS = 16  # a rotated head must have a multiple of this many
_ROTARY_COLUMNS = 8  # cos and sin must have a multiple of this many


@counts(per_layer(attention=1))
def lower_attention_gqa(skeleton: Skeleton) -> Counts:
    """Counts: ``attention`` nodes lowered."""
    nodes = skeleton.nodes(OP_TYPE, DOMAIN)
    lengths = _lengths(skeleton, nodes[0]) if nodes else ()
    _pad_rotary_tables(skeleton)
    for node in nodes:
        query, key, value, past_key, past_value, _, cos, sin = node.inputs
        attributes = {name: node.attributes[name].value for name in ("num_heads", "kv_num_heads", "scale")}
        skeleton.replace(
            node,
            (node.name or "").replace(OP_TYPE, "GroupQueryAttention"),
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, *lengths, cos, sin],
            {**attributes, "do_rotary": 1, "rotary_interleaved": 1},
            domain=CONTRIB,
        )
    skeleton.model.opset_imports.pop(DOMAIN, None)
    skeleton.model.opset_imports[CONTRIB] = 1
    return {"attention": len(nodes)}


def _pad_rotary_tables(skeleton: Skeleton) -> None:
    """Widen cos and sin to the columns that GroupQueryAttention asks for; GLM-4-0414's 32 already fit."""
    config = skeleton.config
    columns = math.ceil(config.rotary_dim // 2 / _ROTARY_COLUMNS) * _ROTARY_COLUMNS
    if columns > config.head_dim // 2:
        raise UserError(
            f"head_dim={config.head_dim} with {config.rotary_dim} rotary columns: ONNX Runtime's attention rotates "
            f"multiples of {2 * _ROTARY_COLUMNS} columns, and a head has no room for {2 * columns}"
        )
    if config.head_dim % _HEAD_COLUMNS:
        raise UserError(
            f"head_dim={config.head_dim}: ONNX Runtime's attention takes heads whose size is a multiple of "
            f"{_HEAD_COLUMNS}"
        )
    for name, recipe in list(skeleton.recipes.items()):
        if isinstance(recipe.expr, RotaryTable) and recipe.expr.columns != columns:
            padded = Recipe(dataclasses.replace(recipe.expr, columns=columns), recipe.dtype)
            old = skeleton.graph.initializers.pop(name)
            old.replace_all_uses_with(skeleton.weight(name, padded))


def _lengths(skeleton: Skeleton, anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
    """From the mask: ``seqlens_k`` int32 [batch], each row's real tokens less one, and the scalar total length."""
    graph_inputs = {value.name: value for value in skeleton.graph.inputs}
    mask = graph_inputs[ATTENTION_MASK]

    def constant(name: str, values: int | list[int]) -> ir.Value:
        return skeleton.constant(name, ir.tensor(values, dtype=ir.DataType.INT64, name=name))

    def add(name: str, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        return skeleton.insert_before(anchor, f"lengths/{name}", op_type, inputs, attributes).outputs[0]

    tokens = add("tokens", "ReduceSum", [mask, constant("lengths/axis", [1])], keepdims=0)
    last = add("last", "Sub", [tokens, constant("lengths/one", 1)])
    seqlens_k = add("seqlens_k", "Cast", [last], to=int(ir.DataType.INT32))
    width = add("width", "Shape", [mask], start=1, end=2)
    scalar = add("scalar", "Squeeze", [width])
    total = add("total_sequence_length", "Cast", [scalar], to=int(ir.DataType.INT32))
    return seqlens_k, total
