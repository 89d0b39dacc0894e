"""Prefill's linears in int8: one scale per output channel for weights, one per row for activations, as they come.

Prefill is bound by arithmetic, and integer matmuls of whole rows run about twice as fast as block-quantized ones.
The nodes around each matmul cost under 2% of it: one QuantizeLinear behind a division by the row's scale, and
MatMulIntegerToFloat, which applies the channels' scales inside the kernel; the row's scale is multiplied in after.

Activations take 7 bits, 1 to 127 around 64, on any machine: without VNNI, kernels add two products in 16 bits, which
255 * 127 * 2 would saturate and 127 * 127 * 2 does not. Where kernels don't, the runtime replaces both constants and
rounds to 8 bits (:mod:`glm4runtime.backends.int8_range`).
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Linear, Skeleton
from glm4export.passes.counted import Counts, counts, layers_linears
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.weights.recipes import Recipe, RowQuantizedPart
from glm4export.weights.storage import HEAD
from glm4runtime.contract import ACTIVATION_STEP, ACTIVATION_ZERO

_ZERO_POINT = 64
_LEVELS = 63


@counts(layers_linears)
def quantize_rows(skeleton: Skeleton) -> Counts:
    """Counts: ``linears`` lowered, ``activations`` quantized for them. The head is left to other passes."""
    constants = _Constants(skeleton)
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    linears = [linear for linear in skeleton.linears() if linear.name != HEAD]
    for linear in linears:
        if linear.input not in quantized:
            quantized[linear.input] = _quantize_activation(skeleton, linear.node, linear.input, constants)
        _lower(skeleton, linear, *quantized[linear.input], constants)
    skeleton.model.opset_imports[CONTRIB] = 1
    return {"linears": len(linears), "activations": len(quantized)}


class _Constants:
    """Scalars that all linears of a graph share."""

    def __init__(self, skeleton: Skeleton) -> None:
        def constant(name: str, value: float | list[int], dtype: ir.DataType) -> ir.Value:
            return skeleton.constant(name, ir.tensor(value, dtype=dtype))

        self.last_axis = constant("rows/last_axis", [-1], ir.DataType.INT64)
        self.one = constant("rows/one", 1.0, ir.DataType.FLOAT)
        self.inverse_levels = constant(ACTIVATION_STEP, 1 / _LEVELS, ir.DataType.FLOAT)
        self.tiny = constant("rows/tiny", 1e-30, ir.DataType.FLOAT)  # a row of zeros: 0 / tiny, not 0 / 0
        self.zero_point = constant(ACTIVATION_ZERO, _ZERO_POINT, ir.DataType.UINT8)


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


def _lower(skeleton: Skeleton, linear: Linear, values: ir.Value, scale: ir.Value, constants: _Constants) -> None:
    node, name = linear.node, linear.node.name or ""
    weight = skeleton.weight(f"{linear.name}.int8", Recipe(RowQuantizedPart(linear.weight, "data"), "int8"))
    steps = skeleton.weight(f"{linear.name}.int8_scales", Recipe(RowQuantizedPart(linear.weight, "scales"), "float32"))
    inputs = [values, weight, constants.one, steps, constants.zero_point]
    op_type = "MatMulIntegerToFloat"
    product = skeleton.insert_before(node, name.replace("/MatMul", f"/{op_type}"), op_type, inputs, domain=CONTRIB)
    skeleton.replace(node, f"{name}/Rows", "Mul", [product.outputs[0], scale])
