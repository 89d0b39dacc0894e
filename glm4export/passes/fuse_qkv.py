"""One matmul for queries, keys and values, where the trace has three.

GLM-4's key and value projections are narrow (2 heads); alone they waste a matmul's start-up and read the input again.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import counts, per_layer
from glm4export.terminal.errors import InternalError
from glm4export.weights.recipes import Concat, Recipe, Transpose
from glm4graphs.attention import DOMAIN, OP_TYPE


@counts(per_layer(fused=1))
def fuse_qkv(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``fused``, layers whose three projections became one. Attention then takes them packed in ``query``."""
    nodes = skeleton.nodes(OP_TYPE, DOMAIN)
    for attention in nodes:
        _fuse(skeleton, attention)
    skeleton.drop_unused_weights()
    return {"fused": len(nodes)}


def _fuse(skeleton: Skeleton, attention: ir.Node) -> None:
    assert attention.name is not None
    scope = attention.name.rsplit("/", 1)[0] + ".qkv_proj"
    weights, biases = zip(*(_projection(attention.inputs[index]) for index in range(3)), strict=True)
    source = _producer(attention.inputs[0])
    matmul = source if source.op_type == "MatMul" else _producer(source.inputs[0])
    recipes = [skeleton.recipes[weight] for weight in weights]
    parts = tuple(recipe.expr.of for recipe in recipes if isinstance(recipe.expr, Transpose))
    if len(parts) != 3:
        raise InternalError(
            f"{attention.name}: {len(parts)} of 3 projections are stored transposed, as lift_weights does"
        )
    fused = Recipe(Transpose(Concat(parts)), recipes[0].dtype)
    packed = skeleton.insert_before(
        attention, f"{scope}/MatMul", "MatMul", [matmul.inputs[0], skeleton.weight(f"{scope}.weight", fused)]
    )
    if biases[0] is not None:
        bias_parts = tuple(skeleton.recipes[bias].expr for bias in biases)
        bias = skeleton.weight(f"{scope}.bias", Recipe(Concat(bias_parts), recipes[0].dtype))
        packed = skeleton.insert_before(attention, f"{scope}/Add", "Add", [packed.outputs[0], bias])
    replaced = [_producer(attention.inputs[index]) for index in range(3)]
    attention.replace_input_with(0, packed.outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    for node in replaced:
        product = node if node.op_type == "MatMul" else _producer(node.inputs[0])
        skeleton.graph.remove(node, safe=True)
        if product is not node:
            skeleton.graph.remove(product, safe=True)


def _projection(value: ir.Value | None) -> tuple[str, str | None]:
    """Names of the weight and the bias of the linear that made ``value``."""
    node, bias = _producer(value), None
    if node.op_type == "Add":
        node, bias = _producer(node.inputs[0]), _name(node.inputs[1])
    return _name(node.inputs[1]), bias


def _producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None, "attention takes its projections from nodes"
    return node


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name
