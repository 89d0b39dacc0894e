"""Lower ``glm4::Attention`` to ONNX Runtime's ``com.microsoft::GroupQueryAttention``, rotary inside it."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.terminal.errors import InternalError
from glm4export.weights.recipes import Recipe, RotaryTable
from glm4graphs.attention import DOMAIN, OP_TYPE
from glm4runtime.contract import ATTENTION_MASK, SEQLENS_K, TOTAL_SEQUENCE_LENGTH, UserError

CONTRIB = "com.microsoft"
_HEAD_COLUMNS = 16  # a rotated head must have a multiple of this many
_ROTARY_COLUMNS = 8  # cos and sin must have a multiple of this many


def _promised(skeleton: Skeleton, *, take_lengths: bool = False) -> Counts:
    return {**per_layer(attention=1)(skeleton), "masks": int(take_lengths)}


@counts(_promised)
def lower_attention_gqa(skeleton: Skeleton, *, take_lengths: bool = False) -> Counts:
    """Counts: ``attention`` nodes lowered, ``masks`` replaced.

    take_lengths: the graph takes what attention is told of lengths, ``seqlens_k`` and ``total_sequence_length``, where
    it took a mask: its inputs have one shape for every length then, and no node computes on the host.
    """
    nodes = skeleton.nodes(OP_TYPE, DOMAIN)
    lengths: tuple[ir.Value, ...] = ()
    if take_lengths:
        lengths = _lengths_as_inputs(skeleton)
    elif nodes:
        lengths = _lengths(skeleton, nodes[0])
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
    if take_lengths:
        _drop_mask(skeleton)
    skeleton.model.opset_imports.pop(DOMAIN, None)
    skeleton.model.opset_imports[CONTRIB] = 1
    return {"attention": len(nodes), "masks": int(take_lengths)}


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


def _lengths_as_inputs(skeleton: Skeleton) -> tuple[ir.Value, ir.Value]:
    """``seqlens_k`` int32 [batch] and ``total_sequence_length`` int32 [], behind the mask."""
    lengths = (
        ir.val(SEQLENS_K, ir.DataType.INT32, ["batch"]),
        ir.val(TOTAL_SEQUENCE_LENGTH, ir.DataType.INT32, []),
    )
    inputs = skeleton.graph.inputs
    index = next(i for i, value in enumerate(inputs) if value.name == ATTENTION_MASK)
    inputs[index + 1 : index + 1] = lengths
    return lengths


def _drop_mask(skeleton: Skeleton) -> None:
    inputs = skeleton.graph.inputs
    index = next(i for i, value in enumerate(inputs) if value.name == ATTENTION_MASK)
    if readers := sorted({use.node.op_type for use in inputs[index].uses()}):
        raise InternalError(f"its mask is read by {', '.join(readers)}, where only {DOMAIN}::{OP_TYPE} is expected to")
    del inputs[index]


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
