"""Store linears quantized for TensorRT: a standard DequantizeLinear between the stored weight and its MatMul.

int4 has a scale for every block of inputs, int8 one for every output channel. TensorRT fuses both into the matmul, so
that the engine holds the small weights; it takes weights as MatMul has them, [in, out], and scales above zero only.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.quantize_linears import linears_left
from glm4export.weights.recipes import QuantizedPart, Recipe, RowQuantizedPart, Transpose
from glm4export.weights.storage import SCALE_DTYPE, Formats


def _promised(skeleton: Skeleton) -> Counts:
    return {"linears": linears_left(skeleton)}


@counts(_promised)
def dequantize_linears(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``linears`` whose weight is stored as integers. One of 16 bits stays as it is."""
    formats = skeleton.formats
    assert formats is not None, "a quantizing pipeline is given its formats"
    linears = 0
    for node in skeleton.nodes("MatMul"):
        stored = next(skeleton.weights_of(node), None)
        if stored is not None and formats.bits(stored) != 16:
            _store(skeleton, node, stored, formats)
            linears += 1
    skeleton.drop_unused_weights()
    return {"linears": linears}


def _store(skeleton: Skeleton, node: ir.Node, stored: str, formats: Formats) -> None:
    recipe = skeleton.recipes[stored]
    assert isinstance(recipe.expr, Transpose), "lift_weights stores every linear transposed"
    expr = recipe.expr.of  # [out, in]
    attributes = {"axis": 1}
    scheme = formats.scheme(stored, expr.shape[1])
    if scheme is None:
        data = Recipe(RowQuantizedPart(expr, "data", SCALE_DTYPE), "int8")
        scales = Recipe(RowQuantizedPart(expr, "scales", SCALE_DTYPE), recipe.dtype)
    else:
        data = Recipe(QuantizedPart(expr, scheme, "data", "transposed"), "int4")
        scales = Recipe(QuantizedPart(expr, scheme, "scales", "transposed"), recipe.dtype)
        attributes = {"axis": 0, "block_size": scheme.block}
    weight = skeleton.insert_before(
        node,
        stored.replace(".weight", "/DequantizeLinear"),
        "DequantizeLinear",
        [skeleton.weight(f"{stored}.{data.dtype}", data), skeleton.weight(f"{stored}.{data.dtype}_scales", scales)],
        attributes,
    )
    node.replace_input_with(1, weight.outputs[0])
