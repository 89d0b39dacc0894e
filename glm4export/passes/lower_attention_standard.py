"""Lower ``glm4::Attention`` to standard opset 24: RotaryEmbedding, TensorScatter into the cache, Attention with a mask.

TensorRT recognises each: as rotary, as an update of the cache in place, and as fused attention. Its cache has a static
length, and it is told where tokens go by inputs of their own, which replace the mask of the traced graph:

- ``position_ids`` int64 [batch, seq], each new token's position;
- ``write_indices`` int64 [batch], the cache row of a sequence's first new token;
- ``attention_mask`` bool [batch, 1, seq, max_seq], the cache rows that each new token sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.terminal.errors import InternalError
from glm4graphs.attention import DOMAIN, OP_TYPE
from glm4graphs.config import Glm4Config
from glm4runtime.contract import ATTENTION_MASK, POSITION_IDS, WRITE_INDICES, past_name, present_name

OPSET = 24  # the first with TensorScatter

_INT8 = int(ir.DataType.INT8)
_HEADS_FIRST = (0, 2, 1, 3)  # [batch, seq, heads, head_dim] to [batch, heads, seq, head_dim] and back


class AttentionInputs(NamedTuple):
    """What attention takes in a step graph."""

    qkv: ir.Value  # [batch, seq, (heads + 2 * kv_heads) * head_dim], queries, keys and values as fuse_qkv packs them
    past_key: ir.Value  # [batch, kv_heads, max_seq, head_dim]
    past_value: ir.Value
    position_ids: ir.Value
    write_indices: ir.Value
    attention_mask: ir.Value
    cos: ir.Value  # [max_seq, rotary_dim / 2]
    sin: ir.Value
    key_scale: ir.Value | None = None  # float32 [kv_heads], where the cache is int8
    value_scale: ir.Value | None = None


class Emit(Protocol):
    """Adds a node: its name within the layer, operator, inputs, outputs' names, and attributes; returns the outputs."""

    def __call__(
        self, name: str, op_type: str, inputs: Sequence[ir.Value | None], outputs: Sequence[str] = (), **attributes: Any
    ) -> Sequence[ir.Value]: ...


class HeadShapes:
    """What Reshape and Split take, the same for every layer."""

    def __init__(self, config: Glm4Config, constant: Callable[[str, list[int]], ir.Value]) -> None:
        self.packed = constant("packed", [config.query_size, config.kv_size, config.kv_size])
        self.query = constant("query_heads", [0, 0, config.num_attention_heads, config.head_dim])
        self.key = self.value = constant("kv_heads", [0, 0, config.num_key_value_heads, config.head_dim])
        self.joined = constant("joined_heads", [0, 0, config.query_size])


@counts(per_layer(attention=1))
def lower_attention_standard(skeleton: Skeleton) -> Counts:
    """Counts: ``attention`` nodes lowered. They take queries, keys and values packed, as fuse_qkv leaves them."""
    nodes = skeleton.nodes(OP_TYPE, DOMAIN)
    inputs = step_inputs(skeleton)
    shapes = head_shapes(skeleton)
    for node in nodes:
        _lower(skeleton, node, shapes, inputs)
    skeleton.model.opset_imports.pop(DOMAIN, None)
    skeleton.model.opset_imports[""] = OPSET
    return {"attention": len(nodes)}


def step_inputs(skeleton: Skeleton) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Give the graph a step graph's inputs: position_ids, write_indices, attention_mask, and a static cache."""
    inputs = _replace_mask(skeleton)
    _fix_cache_length(skeleton)
    return inputs


def attention_inputs(node: ir.Node, inputs: tuple[ir.Value, ir.Value, ir.Value]) -> AttentionInputs:
    """The inputs of a traced ``glm4::Attention`` node, whose mask those of the step graph replace."""
    packed, _, _, past_key, past_value, _, cos, sin = node.inputs
    assert packed and past_key and past_value and cos and sin
    return AttentionInputs(packed, past_key, past_value, *inputs, cos, sin)


def standard_attention(
    emit: Emit, inputs: AttentionInputs, shapes: HeadShapes, rotary_dim: int, scale: float | ir.Attr
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention of one layer in standard operators: what was attended to, and the cache's new keys and values."""
    tables = (inputs.cos, inputs.sin, inputs.position_ids)
    query, key, value = rotated_heads(emit, inputs.qkv, tables, shapes, rotary_dim)

    def update(part: str, past: ir.Value, new: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """The cache with the new rows, as it's stored and as attention reads it."""
        if scale is not None:
            wide = emit(f"{part}/Cast", "Cast", [new], to=int(ir.DataType.FLOAT))
            new = emit(f"{part}/QuantizeLinear", "QuantizeLinear", [*wide, scale], axis=1, output_dtype=_INT8)[0]
        rows = [past, new, inputs.write_indices]
        stored = emit(f"{part}/TensorScatter", "TensorScatter", rows, axis=2, mode="linear")[0]
        if scale is None:
            return stored, stored
        wide = emit(f"{part}/DequantizeLinear", "DequantizeLinear", [stored, scale], axis=1)
        return stored, emit(f"{part}/CastLike", "CastLike", [*wide, inputs.qkv])[0]

    present_key, keys = update("key", inputs.past_key, key, inputs.key_scale)
    present_value, values = update("value", inputs.past_value, value, inputs.value_scale)
    attended = attend(emit, (query, keys, values, inputs.attention_mask), shapes, scale)
    return attended, present_key, present_value


def rotated_heads(
    emit: Emit, qkv: ir.Value, tables: tuple[ir.Value, ir.Value, ir.Value], shapes: HeadShapes, rotary_dim: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries and keys rotated, and values, each [batch, heads, seq, head_dim]; tables are cos, sin, position_ids."""
    parts = emit("Split", "Split", [qkv, shapes.packed], ("query", "key", "value"), axis=-1)
    query, key, value = (
        emit(f"{part}/Transpose", "Transpose", emit(f"{part}/Reshape", "Reshape", [flat, shape]), perm=_HEADS_FIRST)[0]
        for part, flat, shape in zip(
            ("query", "key", "value"), parts, (shapes.query, shapes.key, shapes.value), strict=True
        )
    )
    rotary: dict[str, Any] = {"interleaved": 1, "rotary_embedding_dim": rotary_dim}
    query, key = (
        emit(f"{part}/RotaryEmbedding", "RotaryEmbedding", [x, *tables], **rotary)[0]
        for part, x in (("query", query), ("key", key))
    )
    return query, key, value


def attend(
    emit: Emit,
    inputs: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    shapes: HeadShapes,
    scale: float | ir.Attr,
) -> ir.Value:
    """Attention of queries to keys and values by a mask, as [batch, seq, heads * head_dim]."""
    heads = emit("heads/Attention", "Attention", inputs, scale=scale)
    rows = emit("Transpose", "Transpose", heads, perm=_HEADS_FIRST)
    return emit("Reshape", "Reshape", [*rows, shapes.joined])[0]


def head_shapes(skeleton: Skeleton) -> HeadShapes:
    """As constants of the graph."""
    return HeadShapes(
        skeleton.config,
        lambda name, values: skeleton.constant(f"attention/{name}", ir.tensor(values, dtype=ir.DataType.INT64)),
    )


def emitter(skeleton: Skeleton, node: ir.Node) -> Emit:
    """Adds nodes in front of an attention node, named after its layer."""
    assert node.name is not None
    scope = node.name.removesuffix(f"/{node.op_type}")

    def emit(
        name: str, op_type: str, inputs: Sequence[ir.Value | None], outputs: Sequence[str] = (), **attributes: Any
    ) -> Sequence[ir.Value]:
        values = [ir.val(f"{scope}/{output}") for output in outputs or (name,)]
        return skeleton.insert_before(node, f"{scope}/{name}", op_type, inputs, attributes, outputs=values).outputs

    return emit


def _lower(skeleton: Skeleton, node: ir.Node, shapes: HeadShapes, inputs: tuple[ir.Value, ir.Value, ir.Value]) -> None:
    emit = emitter(skeleton, node)
    scale = node.attributes["scale"].as_float()
    made = standard_attention(emit, attention_inputs(node, inputs), shapes, skeleton.config.rotary_dim, scale)
    skeleton.replace_outputs(node, made)


def _replace_mask(skeleton: Skeleton) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Put the three inputs into the place of the traced int64 mask."""
    inputs = skeleton.graph.inputs
    index = next(i for i, value in enumerate(inputs) if value.name == ATTENTION_MASK)

    new = (
        ir.val(POSITION_IDS, ir.DataType.INT64, ["batch", "seq"]),
        ir.val(WRITE_INDICES, ir.DataType.INT64, ["batch"]),
        ir.val(ATTENTION_MASK, ir.DataType.BOOL, ["batch", 1, "seq", skeleton.max_seq_len]),
    )
    old = inputs[index]
    for node in skeleton.nodes(OP_TYPE, DOMAIN):
        node.replace_input_with(list(node.inputs).index(old), None)
    if old.uses():
        readers = ", ".join(sorted({use.node.op_type for use in old.uses()}))
        raise InternalError(f"step graph: its mask is read by {readers}, where only {DOMAIN}::{OP_TYPE} is expected to")
    inputs[index : index + 1] = new
    return new


def _fix_cache_length(skeleton: Skeleton) -> None:
    """TensorRT updates a cache in place only where its length is static."""
    config = skeleton.config
    shape: list[int | str] = ["batch", config.num_key_value_heads, skeleton.max_seq_len, config.head_dim]
    boundary = {value.name: value for value in (*skeleton.graph.inputs, *skeleton.graph.outputs)}
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            for name in (past_name(layer, part), present_name(layer, part)):
                boundary[name].shape = ir.Shape(shape)
