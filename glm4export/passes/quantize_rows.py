"""Prefill's linears in int8: one scale per output channel for weights, one per row for activations, as they come.

Prefill is bound by arithmetic, and integer matmuls of whole rows run about twice as fast as block-quantized ones.
The nodes around each matmul cost under 2% of it: one QuantizeLinear behind a division by the row's scale, and
MatMulIntegerToFloat, which applies the channels' scales inside the kernel; the row's scale is multiplied in after.

Activations take 7 bits, 1 to 127 around 64, on any machine: without VNNI, kernels add two products in 16 bits, which
255 * 127 * 2 would saturate and 127 * 127 * 2 does not.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.weights.recipes import Recipe, RowQuantizedPart, Transpose
from glm4export.weights.storage import HEAD

_ZERO_POINT = 64
_LEVELS = 63


def _promised(skeleton: Skeleton) -> Counts:
    layers = skeleton.config.num_hidden_layers
    # Inputs: of q, k and v together, of o, of gate_up, of down.
    return {"linears": skeleton.linears_of_layer * layers, "activations": 4 * layers}


@counts(_promised)
def quantize_rows(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``linears`` lowered, ``activations`` quantized for them. The head is left to other passes."""
    constants = _Constants(skeleton)
    quantized: dict[int, tuple[ir.Value, ir.Value]] = {}
    linears = 0
    for node in skeleton.nodes("MatMul"):
        stored = next(skeleton.weights_of(node), None)
        if stored is None or stored == HEAD:
            continue
        x = node.inputs[0]
        assert x is not None and node.name is not None
        if id(x) not in quantized:
            quantized[id(x)] = _quantize_activation(skeleton, node, x, constants)
        _lower(skeleton, node, stored, *quantized[id(x)], constants)
        linears += 1
    skeleton.drop_unused_weights()
    skeleton.model.opset_imports[CONTRIB] = 1
    return {"linears": linears, "activations": len(quantized)}


class _Constants:
    """Scalars that all linears of a graph share."""

    def __init__(self, skeleton: Skeleton) -> None:
        def constant(name: str, value: float | list[int], dtype: ir.DataType) -> ir.Value:
            return skeleton.constant(f"rows/{name}", ir.tensor(value, dtype=dtype))

        self.last_axis = constant("last_axis", [-1], ir.DataType.INT64)
        self.one = constant("one", 1.0, ir.DataType.FLOAT)
        self.inverse_levels = constant("inverse_levels", 1 / _LEVELS, ir.DataType.FLOAT)
        self.tiny = constant("tiny", 1e-30, ir.DataType.FLOAT)  # a row of zeros: 0 / tiny, not 0 / 0
        self.zero_point = constant("zero_point", _ZERO_POINT, ir.DataType.UINT8)


def _quantize_activation(
    skeleton: Skeleton, anchor: ir.Node, x: ir.Value, constants: _Constants
) -> tuple[ir.Value, ir.Value]:
    """uint8 values of x [batch, seq, in] and the float32 scale of each row [batch, seq, 1]."""
    scope = (anchor.name or "").rsplit("/", 1)[0]

    def add(name: str, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        return skeleton.insert_before(anchor, f"{scope}/{name}", op_type, inputs, attributes).outputs[0]

    largest = add("Largest", "ReduceMax", [add("Abs", "Abs", [x]), constants.last_axis], keepdims=1)
    scale = add("Scale", "Max", [add("Step", "Mul", [largest, constants.inverse_levels]), constants.tiny])
    ratio = add("Div", "Div", [x, scale])
    return add("QuantizeLinear", "QuantizeLinear", [ratio, constants.one, constants.zero_point]), scale


def _lower(
    skeleton: Skeleton, node: ir.Node, stored: str, values: ir.Value, scale: ir.Value, constants: _Constants
) -> None:
    recipe = skeleton.recipes[stored]
    assert isinstance(recipe.expr, Transpose), "lift_weights stores every linear transposed"
    weight = skeleton.weight(f"{stored}.int8", Recipe(RowQuantizedPart(recipe.expr.of, "data"), "int8"))
    steps = skeleton.weight(f"{stored}.int8_scales", Recipe(RowQuantizedPart(recipe.expr.of, "scales"), "float32"))
    product = skeleton.insert_before(
        node,
        (node.name or "").replace("/MatMul", "/MatMulIntegerToFloat"),
        "MatMulIntegerToFloat",
        [values, weight, constants.one, steps, constants.zero_point],
        domain=CONTRIB,
    )
    result = node.outputs[0]
    output = ir.Value(name=result.name, shape=result.shape, type=result.type)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    skeleton.insert_before(node, f"{node.name}/Rows", "Mul", [product.outputs[0], scale], outputs=[output])
    skeleton.graph.remove(node, safe=True)
