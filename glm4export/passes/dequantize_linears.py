"""Store linears quantized for TensorRT: a standard DequantizeLinear between the stored weight and its MatMul.

int4 has a scale for every block of inputs, int8 one for every output channel. TensorRT fuses both into the matmul, so
that the engine holds the small weights; it takes weights as MatMul has them, [in, out], and scales above zero only.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.passes.counted import Counts, counts
from glm4export.passes.quantize_linears import HEAD, SCALE_DTYPE, linears_left, scheme_of
from glm4export.recipes import QuantizedPart, Recipe, RowQuantizedPart, Transpose
from glm4export.skeleton import Skeleton


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
        bits = formats.head_bits if stored == HEAD else formats.linear_bits
        if stored is not None and bits != 16:
            _store(skeleton, node, stored, bits)
            linears += 1
    skeleton.drop_unused_weights()
    return {"linears": linears}


def _store(skeleton: Skeleton, node: ir.Node, stored: str, bits: int) -> None:
    formats, recipe = skeleton.formats, skeleton.recipes[stored]
    assert formats is not None
    assert isinstance(recipe.expr, Transpose), "lift_weights stores every linear transposed"
    expr = recipe.expr.of  # [out, in]
    attributes = {"axis": 1}
    if bits == 8:
        data = Recipe(RowQuantizedPart(expr, "data", SCALE_DTYPE), "int8")
        scales = Recipe(RowQuantizedPart(expr, "scales", SCALE_DTYPE), recipe.dtype)
    else:
        scheme = scheme_of(expr.shape[1], bits, formats)
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
