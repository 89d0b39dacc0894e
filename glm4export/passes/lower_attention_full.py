"""Lower ``glm4::FullAttention`` to standard operators: RotaryEmbedding, and Attention with a mask made in the graph.

One lowering for every target: TensorRT takes these operators, and on a CPU they cost no more than GroupQueryAttention
until a text has hundreds of tokens, where attention is a few percent of a layer. GroupQueryAttention knows padding
behind the text only.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_bias import position_input
from glm4export.passes.lower_attention_standard import (
    OPSET,
    Emit,
    HeadShapes,
    attend,
    emitter,
    head_shapes,
    rotated_heads,
)
from glm4graphs.attention import DOMAIN, FULL_OP_TYPE
from glm4runtime.contract import ATTENTION_MASK

_BEHIND_ALL = 2**31 - 1  # a place behind every text


class _Mask(NamedTuple):
    """What the layers share, made of the graph's mask."""

    position_ids: ir.Value  # int64 [batch, seq]
    visible: ir.Value  # bool [batch, 1, seq, seq], the keys that each query sees
    real: ir.Value  # bool [batch, 1, seq, 1], the keys that are no padding
    zero: ir.Value  # a scalar of the activations' dtype


def _promised(skeleton: Skeleton, position_ids: bool) -> Counts:
    return {"attention": skeleton.config.num_hidden_layers}


@counts(_promised)
def lower_attention_full(skeleton: Skeleton, position_ids: bool) -> Counts:
    """Counts: ``attention`` nodes lowered. They take queries, keys and values packed, as fuse_qkv leaves them.

    position_ids: positions are an input; else they count from each row's first place.
    """
    nodes, shapes = skeleton.nodes(FULL_OP_TYPE, DOMAIN), head_shapes(skeleton)
    mask = _mask(skeleton, nodes[0], position_input(skeleton) if position_ids else None)
    for node in nodes:
        made = _lower(emitter(skeleton, node), node, shapes, mask, skeleton.config.rotary_dim)
        skeleton.replace_outputs(node, [made])
    skeleton.model.opset_imports.pop(DOMAIN, None)
    skeleton.model.opset_imports[""] = OPSET
    return {"attention": len(nodes)}


def _lower(emit: Emit, node: ir.Node, shapes: HeadShapes, mask: _Mask, rotary_dim: int) -> ir.Value:
    packed, _, _, _, cos, sin = node.inputs
    assert packed and cos and sin
    query, key, value = rotated_heads(emit, packed, (cos, sin, mask.position_ids), shapes, rotary_dim)
    values = emit("value/Where", "Where", [mask.real, value, mask.zero])[0]
    return attend(emit, (query, key, values, mask.visible), shapes, node.attributes["scale"].as_float())


def _mask(skeleton: Skeleton, anchor: ir.Node, positions: ir.Value | None) -> _Mask:
    """A token sees the real ones up to itself.

    One that would see none, in padding in front of a text, sees that padding, whose values are zero: so it attends to
    nothing, as in PyTorch. A row of a mask that is all false would leave what comes out to each kernel, and the
    operator's definition gives NaN.
    """
    given = next(value for value in skeleton.graph.inputs if value.name == ATTENTION_MASK)
    cos = anchor.inputs[4]
    assert cos is not None and cos.dtype is not None

    def constant(name: str, value: int | list[int]) -> ir.Value:
        return skeleton.constant(f"mask/{name}", ir.tensor(value, dtype=ir.DataType.INT64))

    def add(name: str, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return skeleton.insert_before(anchor, f"mask/{name}", op_type, inputs, attributes).outputs[0]

    zero, one = constant("zero", 0), constant("one", 1)
    real = add("real", "Cast", given, to=int(ir.DataType.BOOL))  # [batch, seq]
    size = add("size", "Shape", given)
    seq = add("seq", "Gather", size, one)
    places = add("places", "Range", zero, seq, one)  # [seq]
    own = add("own", "Where", real, places, constant("behind_all", _BEHIND_ALL))
    first = add("first", "ReduceMin", own, constant("of_row", [1]), keepdims=1)  # [batch, 1], the first real place
    blind = add("blind", "Less", places, first)  # [batch, seq], sees nothing real
    keys = add("keys", "Unsqueeze", real, constant("heads_and_queries", [1, 2]))
    queries = constant("heads_and_keys", [1, 3])
    either = add("either", "Or", keys, add("queries", "Unsqueeze", blind, queries))  # [batch, 1, seq, seq]
    causal = add("causal", "LessOrEqual", places, add("query_places", "Unsqueeze", places, constant("key", [1])))
    return _Mask(
        position_ids=positions or add("position_ids", "Expand", places, size),
        visible=add("visible", "And", either, causal),
        real=add("real_keys", "Unsqueeze", real, queries),
        zero=skeleton.constant("mask/no_value", ir.tensor(0.0, dtype=cos.dtype)),
    )
