"""Linears in fp8 (E4M3) for TensorRT: one scale per output channel for weights, one static scale per activation.

The scales of activations are what a calibration text's inputs reached (:mod:`glm4export.calibration.observe`), divided
by E4M3's largest number. Tensor cores of compute capability 8.9 and later multiply fp8 by fp8 in twice the rate of
fp16; what TensorRT needs for that is Q and DQ in front of either side of the matmul. The head is left to
``dequantize_linears``.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import ONNX_DTYPES, Linear, Skeleton
from glm4export.passes.counted import Counts, counts, layers_linears
from glm4export.passes.dequantize_linears import store_dequantized
from glm4export.weights.recipes import Concat, Expr, InputScale, Recipe, RowQuantizedPart, Scale, Source
from glm4export.weights.storage import HEAD, SCALE_DTYPE

FP8 = "float8_e4m3fn"


@counts(lambda skeleton, branch: layers_linears(skeleton))
def quantize_fp8(skeleton: Skeleton, branch: float) -> Counts:
    """Counts: ``linears`` lowered, ``activations`` quantized for them.

    ``branch``: what rescale_fp16 scaled the up half of gate_up_proj by, and with it down_proj's input.
    """
    quantized: dict[ir.Value, ir.Value] = {}
    linears = [linear for linear in skeleton.linears() if linear.name != HEAD]
    for linear in linears:
        if linear.input not in quantized:
            factor = branch if linear.name.endswith(".mlp.down_proj.weight") else 1.0
            quantized[linear.input] = _activation(skeleton, linear, factor)
        linear.node.replace_input_with(0, quantized[linear.input])
        data, scales = (RowQuantizedPart(linear.weight, part, SCALE_DTYPE, FP8) for part in ("data", "scales"))
        store_dequantized(skeleton, linear, "fp8", Recipe(data, FP8), Recipe(scales, linear.dtype), {"axis": 1})
    return {"linears": len(linears), "activations": len(quantized)}


def _activation(skeleton: Skeleton, linear: Linear, factor: float) -> ir.Value:
    """A linear's input through fp8 and back, at the scale that its calibration inputs call for."""
    scope = (linear.node.name or "").removesuffix("/MatMul")
    reach = InputScale(tuple(_sources(linear.weight)), factor)
    scale = skeleton.weight(f"{scope}.input_scale", Recipe(reach, linear.dtype))
    to = {"output_dtype": int(ONNX_DTYPES[FP8])}
    narrow = skeleton.insert_before(linear.node, f"{scope}/QuantizeLinear", "QuantizeLinear", [linear.input, scale], to)
    inputs = [narrow.outputs[0], scale]
    return skeleton.insert_before(linear.node, f"{scope}/input/DequantizeLinear", "DequantizeLinear", inputs).outputs[0]


def _sources(expr: Expr) -> list[str]:
    """The checkpoint's names of the weights in an expression: linears that read one input."""
    if isinstance(expr, Source):
        return [expr.name]
    if isinstance(expr, Concat):
        return [name for part in expr.parts for name in _sources(part)]
    assert isinstance(expr, Scale)
    return _sources(expr.of)
