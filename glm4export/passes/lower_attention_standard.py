"""Lower ``glm4::Attention`` to standard opset 24: RotaryEmbedding, TensorScatter into the cache, Attention with a mask.

TensorRT recognises each: as rotary, as an update of the cache in place, and as fused attention. Its cache has a static
length, and it is told where tokens go by inputs of their own, which replace the mask of the traced graph:

- ``position_ids`` int64 [batch, seq], each new token's position;
- ``write_indices`` int64 [batch], the cache row of a sequence's first new token;
- ``attention_mask`` bool [batch, 1, seq, max_seq], the cache rows that each new token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from glm4export.skeleton import Skeleton
from glm4graphs.attention import DOMAIN, OP_TYPE
from glm4runtime.contract import ATTENTION_MASK, POSITION_IDS, WRITE_INDICES, past_name, present_name

OPSET = 24  # the first with TensorScatter

_HEADS_FIRST = (0, 2, 1, 3)  # [batch, seq, heads, head_dim] to [batch, heads, seq, head_dim] and back


def lower_attention_standard(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``attention`` nodes lowered. They take queries, keys and values packed, as fuse_qkv leaves them."""
    nodes = skeleton.nodes(OP_TYPE, DOMAIN)
    positions, indices, mask = _replace_mask(skeleton)
    _fix_cache_length(skeleton)
    shapes = _Shapes(skeleton)
    for node in nodes:
        _lower(skeleton, node, shapes, positions, indices, mask)
    skeleton.model.opset_imports.pop(DOMAIN, None)
    skeleton.model.opset_imports[""] = OPSET
    return {"attention": len(nodes)}


class _Shapes:
    """What Reshape and Split take, the same for every layer."""

    def __init__(self, skeleton: Skeleton) -> None:
        config = skeleton.config

        def constant(name: str, values: list[int]) -> ir.Value:
            return skeleton.constant(f"attention/{name}", ir.tensor(values, dtype=ir.DataType.INT64))

        sizes = [config.query_size, config.kv_size, config.kv_size]
        self.packed = constant("packed", sizes)
        self.query = constant("query_heads", [0, 0, config.num_attention_heads, config.head_dim])
        self.key = self.value = constant("kv_heads", [0, 0, config.num_key_value_heads, config.head_dim])
        self.joined = constant("joined_heads", [0, 0, config.query_size])


def _lower(
    skeleton: Skeleton, node: ir.Node, shapes: _Shapes, positions: ir.Value, indices: ir.Value, mask: ir.Value
) -> None:
    assert node.name is not None
    packed, _, _, past_key, past_value, _, cos, sin = node.inputs
    attended, present_key, present_value = node.outputs
    scope = node.name.removesuffix(f"/{OP_TYPE}")

    def add(name: str, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        return skeleton.insert_before(node, f"{scope}/{name}", op_type, inputs, attributes).outputs[0]

    def add_as(
        old: ir.Value, name: str, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any
    ) -> ir.Value:
        """Its output takes the name and the users of ``old``."""
        new = ir.Value(name=old.name, shape=old.shape, type=old.type)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        skeleton.insert_before(node, f"{scope}/{name}", op_type, inputs, attributes, outputs=[new])
        return new

    parts = [ir.Value(name=f"{scope}/{part}") for part in ("query", "key", "value")]
    skeleton.insert_before(node, f"{scope}/Split", "Split", [packed, shapes.packed], {"axis": -1}, outputs=parts)
    query, key, value = (
        add(f"{part}/Transpose", "Transpose", [add(f"{part}/Reshape", "Reshape", [flat, shape])], perm=_HEADS_FIRST)
        for part, flat, shape in zip(
            ("query", "key", "value"), parts, (shapes.query, shapes.key, shapes.value), strict=True
        )
    )
    rotary = {"interleaved": 1, "rotary_embedding_dim": skeleton.config.rotary_dim}
    query, key = (
        add(f"{part}/RotaryEmbedding", "RotaryEmbedding", [x, cos, sin, positions], **rotary)
        for part, x in (("query", query), ("key", key))
    )
    keys, values = (
        add_as(present, f"{part}/TensorScatter", "TensorScatter", [past, new, indices], axis=2, mode="linear")
        for part, past, new, present in (
            ("key", past_key, key, present_key),
            ("value", past_value, value, present_value),
        )
    )
    heads = add("heads/Attention", "Attention", [query, keys, values, mask], scale=node.attributes["scale"].as_float())
    rows = add("Transpose", "Transpose", [heads], perm=_HEADS_FIRST)
    add_as(attended, "Reshape", "Reshape", [rows, shapes.joined])
    skeleton.graph.remove(node, safe=True)


def _replace_mask(skeleton: Skeleton) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Put the three inputs into the place of the traced int64 mask."""
    inputs = skeleton.graph.inputs
    index = next(i for i, value in enumerate(inputs) if value.name == ATTENTION_MASK)

    def declared(name: str, dtype: ir.DataType, dims: list[int | str]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))

    new = (
        declared(POSITION_IDS, ir.DataType.INT64, ["batch", "seq"]),
        declared(WRITE_INDICES, ir.DataType.INT64, ["batch"]),
        declared(ATTENTION_MASK, ir.DataType.BOOL, ["batch", 1, "seq", skeleton.max_seq_len]),
    )
    old = inputs[index]
    for node in skeleton.nodes(OP_TYPE, DOMAIN):
        node.replace_input_with(list(node.inputs).index(old), None)
    assert not old.uses(), "only attention reads the mask of a step graph"
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
