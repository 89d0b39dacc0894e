"""Linears in fp8 (E4M3) for TensorRT: one scale per output channel for weights, one static scale per activation.

The scales of activations are what a calibration text's inputs reached (:mod:`glm4export.calibration.observe`), divided
by E4M3's largest number. Tensor cores of compute capability 8.9 and later multiply fp8 by fp8 in twice the rate of
fp16; what TensorRT needs for that is Q and DQ in front of either side of the matmul. The head is left to
``dequantize_linears``.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import ONNX_DTYPES, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.weights.recipes import (
    Concat,
    Expr,
    InputScale,
    Recipe,
    RowQuantizedPart,
    Scale,
    Source,
    Transpose,
)
from glm4export.weights.storage import HEAD, SCALE_DTYPE

FP8 = "float8_e4m3fn"


def _promised(skeleton: Skeleton) -> Counts:
    layers = skeleton.config.num_hidden_layers
    # Inputs: of q, k and v together, of o, of gate_up, of down.
    return {"linears": skeleton.linears_of_layer * layers, "activations": 4 * layers}


@counts(_promised)
def quantize_fp8(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``linears`` lowered, ``activations`` quantized for them."""
    scales = skeleton.fp16_scales
    assert scales is not None, "fp8 computes around its matmuls in fp16"
    quantized: dict[int, ir.Value] = {}
    linears = 0
    for node in skeleton.nodes("MatMul"):
        stored = next(skeleton.weights_of(node), None)
        if stored is None or stored == HEAD:
            continue
        x = node.inputs[0]
        assert x is not None
        recipe = skeleton.recipes[stored]
        assert isinstance(recipe.expr, Transpose), "lift_weights stores every linear transposed"
        if id(x) not in quantized:
            # down_proj's input is the scaled half of gate_up_proj's output; see rescale_fp16
            factor = scales.branch if stored.endswith(".mlp.down_proj.weight") else 1.0
            quantized[id(x)] = _activation(skeleton, node, x, recipe, factor)
        node.replace_input_with(0, quantized[id(x)])
        node.replace_input_with(1, _weight(skeleton, node, stored, recipe))
        linears += 1
    skeleton.drop_unused_weights()
    return {"linears": linears, "activations": len(quantized)}


def _activation(skeleton: Skeleton, node: ir.Node, x: ir.Value, recipe: Recipe, factor: float) -> ir.Value:
    """x through fp8 and back, at the scale that the linear's calibration inputs call for."""
    scope = (node.name or "").removesuffix("/MatMul")
    scale = skeleton.weight(
        f"{scope}.input_scale", Recipe(InputScale(tuple(_sources(recipe.expr)), factor), recipe.dtype)
    )
    to = {"output_dtype": int(ONNX_DTYPES[FP8])}
    narrow = skeleton.insert_before(node, f"{scope}/QuantizeLinear", "QuantizeLinear", [x, scale], to)
    wide = skeleton.insert_before(
        node, f"{scope}/input/DequantizeLinear", "DequantizeLinear", [narrow.outputs[0], scale]
    )
    return wide.outputs[0]


def _weight(skeleton: Skeleton, node: ir.Node, stored: str, recipe: Recipe) -> ir.Value:
    assert isinstance(recipe.expr, Transpose)
    data, scales = (RowQuantizedPart(recipe.expr.of, part, SCALE_DTYPE, FP8) for part in ("data", "scales"))
    inputs = [
        skeleton.weight(f"{stored}.fp8", Recipe(data, FP8)),
        skeleton.weight(f"{stored}.fp8_scales", Recipe(scales, recipe.dtype)),
    ]
    name = stored.replace(".weight", "/DequantizeLinear")
    return skeleton.insert_before(node, name, "DequantizeLinear", inputs, {"axis": 1}).outputs[0]


def _sources(expr: Expr) -> list[str]:
    """The checkpoint's names of the weights in an expression: linears that read one input."""
    if isinstance(expr, Source):
        return [expr.name]
    if isinstance(expr, Concat):
        return [name for part in expr.parts for name in _sources(part)]
    assert isinstance(expr, Transpose | Scale)
    return _sources(expr.of)
