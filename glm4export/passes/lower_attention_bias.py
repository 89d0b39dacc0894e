"""Lower attention to GroupQueryAttention with the mask as a bias and the rotary in nodes of its own.

For graphs that take ``position_ids`` int64 [batch, seq], and read ``attention_mask`` int64 [batch, total_seq] as
transformers does: new tokens are the last ones of it, it may hide any row of the cache, padding stays there. So rows
may be padded in front as well as behind. GroupQueryAttention by itself counts a row's ones and takes them to stand
first; of a prompt's position_ids its CPU kernel reads the first one only.

And for graphs without a cache that give attention weights: the standard operator gives them too, but its inferred shape
has no keys where their number is a dynamic dim (onnx 1.23, onnxruntime 1.32).
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.passes.lower_attention_standard import Emit, emitter, head_shapes
from glm4graphs.attention import DOMAIN, FULL_OP_TYPE, OP_TYPE
from glm4graphs.config import Glm4Config
from glm4runtime.contract import ATTENTION_MASK, POSITION_IDS

_HIDDEN = -30000.0  # exp() makes 0 of it, and fp16 holds it: a token that sees nothing but padding gets numbers


def _promised(skeleton: Skeleton, position_ids: bool) -> Counts:
    return {"attention": skeleton.config.num_hidden_layers}


@counts(_promised)
def lower_attention_bias(skeleton: Skeleton, position_ids: bool) -> Counts:
    """Counts: ``attention`` nodes lowered. They take queries, keys and values packed, as fuse_qkv leaves them.

    position_ids: they are an input; else, without a cache, positions count from each row's first place.
    """
    nodes = skeleton.nodes(OP_TYPE, DOMAIN) + skeleton.nodes(FULL_OP_TYPE, DOMAIN)
    packed = head_shapes(skeleton).packed
    given = position_input(skeleton) if position_ids else None
    positions, lengths, bias = _of_mask(skeleton, nodes[0], given)
    for node in nodes:
        past = node.inputs[3:5] if node.op_type == OP_TYPE else (None, None)
        inputs = _rotated(emitter(skeleton, node), node, packed, positions, skeleton.config)
        attributes = {name: node.attributes[name].value for name in ("num_heads", "kv_num_heads", "scale")}
        skeleton.replace(
            node,
            (node.name or "").replace(node.op_type, "GroupQueryAttention"),
            "GroupQueryAttention",
            [*inputs, *past, *lengths, None, None, None, bias],
            attributes,
            domain=CONTRIB,
        )
    skeleton.model.opset_imports.pop(DOMAIN, None)
    skeleton.model.opset_imports[CONTRIB] = 1
    return {"attention": len(nodes)}


def position_input(skeleton: Skeleton) -> ir.Value:
    """Give the graph the input ``position_ids``, behind its mask."""
    inputs = skeleton.graph.inputs
    index, mask = next((i, value) for i, value in enumerate(inputs) if value.name == ATTENTION_MASK)
    assert mask.shape is not None
    positions = ir.val(POSITION_IDS, ir.DataType.INT64, ir.Shape((mask.shape[0], "seq")))
    inputs.insert(index + 1, positions)
    return positions


def _rotated(
    emit: Emit, node: ir.Node, packed: ir.Value, positions: ir.Value, config: Glm4Config
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries and keys rotated, and values, each [batch, seq, heads * head_dim]."""
    qkv, *_, cos, sin = node.inputs
    query, key, value = emit("Split", "Split", [qkv, packed], ("query", "key", "value"), axis=-1)

    def rotated(part: str, x: ir.Value, heads: int) -> ir.Value:
        return emit(
            f"{part}/RotaryEmbedding",
            "RotaryEmbedding",
            [x, cos, sin, positions],
            interleaved=1,
            rotary_embedding_dim=config.rotary_dim,
            num_heads=heads,
        )[0]

    query = rotated("query", query, config.num_attention_heads)
    return query, rotated("key", key, config.num_key_value_heads), value


def _of_mask(
    skeleton: Skeleton, anchor: ir.Node, positions: ir.Value | None
) -> tuple[ir.Value, tuple[ir.Value, ir.Value], ir.Value]:
    """Positions int64 [batch, seq]; ``seqlens_k`` int32 [batch], each total - 1, and the total, a scalar; the bias
    [batch, 1, seq, total]."""
    mask = next(value for value in skeleton.graph.inputs if value.name == ATTENTION_MASK)
    cos = anchor.inputs[-2]
    assert cos is not None and cos.dtype is not None

    def constant(name: str, value: float | list[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return skeleton.constant(f"mask/{name}", ir.tensor(value, dtype=dtype))

    def add(name: str, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return skeleton.insert_before(anchor, f"mask/{name}", op_type, inputs, attributes).outputs[0]

    batch, width = add("batch", "Shape", mask, start=0, end=1), add("width", "Shape", mask, start=1, end=2)
    scalar, ones = add("scalar", "Squeeze", width), constant("ones", [1])
    if positions is None:
        places = add("places", "Range", constant("first", 0), scalar, constant("step", 1))
        positions = add("position_ids", "Expand", places, add("size", "Shape", mask))
    last = add("last", "Cast", add("last_row", "Sub", width, ones), to=int(ir.DataType.INT32))
    total = add("total_sequence_length", "Cast", scalar, to=int(ir.DataType.INT32))
    visible = add("visible", "Cast", mask, to=int(ir.DataType.BOOL))
    row = add("row", "Where", visible, constant("seen", 0.0, cos.dtype), constant("hidden", _HIDDEN, cos.dtype))
    every = add("every_head", "Unsqueeze", row, constant("heads_and_queries", [1, 2]))  # [batch, 1, 1, total]
    seq = add("seq", "Shape", positions, start=1, end=2)
    bias = add("bias", "Expand", every, add("bias_shape", "Concat", ones, ones, seq, ones, axis=0))
    return positions, (add("seqlens_k", "Expand", last, batch), total), bias
