"""One matmul for queries, keys and values, where the trace has three.

GLM-4's key and value projections are narrow (2 heads); alone they waste a matmul's start-up and read the input again.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Linear, Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.weights.recipes import Concat, Recipe, Transpose
from glm4graphs.attention import DOMAIN, FULL_OP_TYPE, OP_TYPE


@counts(per_layer(fused=1))
def fuse_qkv(skeleton: Skeleton) -> Counts:
    """Counts: ``fused``, layers whose three projections became one. Attention then takes them packed in ``query``."""
    nodes = skeleton.nodes(OP_TYPE, DOMAIN) + skeleton.nodes(FULL_OP_TYPE, DOMAIN)
    linears = {linear.node: linear for linear in skeleton.linears()}
    for attention in nodes:
        _fuse(skeleton, attention, linears)
    return {"fused": len(nodes)}


def _fuse(skeleton: Skeleton, attention: ir.Node, linears: dict[ir.Node, Linear]) -> None:
    assert attention.name is not None
    scope = attention.name.rsplit("/", 1)[0] + ".qkv_proj"
    adds = [node for value in attention.inputs[:3] if (node := _producer(value)).op_type == "Add"]
    matmuls = [_producer(node.inputs[0]) for node in adds] or [_producer(value) for value in attention.inputs[:3]]
    query, key, value = (linears[node] for node in matmuls)
    weight = Recipe(Transpose(Concat((query.weight, key.weight, value.weight))), query.dtype)
    stored = skeleton.weight(f"{scope}.weight", weight)
    packed = skeleton.insert_before(attention, f"{scope}/MatMul", "MatMul", [query.input, stored])
    if adds:
        biases = tuple(skeleton.recipes[name].expr for node in adds for name in skeleton.weights_of(node))
        stored = skeleton.weight(f"{scope}.bias", Recipe(Concat(biases), query.dtype))
        packed = skeleton.insert_before(attention, f"{scope}/Add", "Add", [packed.outputs[0], stored])
    for index, new in enumerate((packed.outputs[0], None, None)):
        attention.replace_input_with(index, new)
    skeleton.graph.remove([*adds, *matmuls], safe=True)


def _producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None, "attention takes its projections from nodes"
    return node
