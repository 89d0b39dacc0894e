"""Store linears quantized for TensorRT: a standard DequantizeLinear between the stored weight and its MatMul.

int4 has a scale for every block of inputs, int8 one for every output channel. TensorRT fuses both into the matmul, so
that the engine holds the small weights; it takes weights as MatMul has them, [in, out], and scales above zero only.
"""

from __future__ import annotations

from glm4export.graph.skeleton import Linear, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.quantize_linears import linears_left
from glm4export.weights.recipes import QuantizedPart, Recipe, RowQuantizedPart
from glm4export.weights.storage import SCALE_DTYPE, Formats


def _promised(skeleton: Skeleton, formats: Formats) -> Counts:
    return {"linears": linears_left(skeleton, formats)}


@counts(_promised)
def dequantize_linears(skeleton: Skeleton, formats: Formats) -> Counts:
    """Counts: ``linears`` whose weight is stored as integers. One of 16 bits stays as it is."""
    linears = [linear for linear in skeleton.linears() if formats.bits(linear.name) != 16]
    for linear in linears:
        _store(skeleton, linear, formats)
    return {"linears": len(linears)}


def _store(skeleton: Skeleton, linear: Linear, formats: Formats) -> None:
    scheme = formats.scheme(linear.name, linear.weight.shape[1])
    if scheme is None:
        data = Recipe(RowQuantizedPart(linear.weight, "data", SCALE_DTYPE), "int8")
        scales = Recipe(RowQuantizedPart(linear.weight, "scales", SCALE_DTYPE), linear.dtype)
        store_dequantized(skeleton, linear, "int8", data, scales, {"axis": 1})
    else:
        data = Recipe(QuantizedPart(linear.weight, scheme, "data", "transposed"), "int4")
        scales = Recipe(QuantizedPart(linear.weight, scheme, "scales", "transposed"), linear.dtype)
        store_dequantized(skeleton, linear, "int4", data, scales, {"axis": 0, "block_size": scheme.block})


def store_dequantized(
    skeleton: Skeleton, linear: Linear, kind: str, data: Recipe, scales: Recipe, attributes: dict[str, int]
) -> None:
    """Have a linear's MatMul read DequantizeLinear of ``data`` [in, out], of that kind, and ``scales``."""
    stored = f"{linear.name}.{kind}"
    inputs = [skeleton.weight(stored, data), skeleton.weight(f"{stored}_scales", scales)]
    name = linear.name.replace(".weight", "/DequantizeLinear")
    wide = skeleton.insert_before(linear.node, name, "DequantizeLinear", inputs, attributes)
    linear.node.replace_input_with(1, wide.outputs[0])
