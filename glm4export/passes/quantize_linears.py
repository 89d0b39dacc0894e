"""Store linears block-quantized: ``com.microsoft::MatMulNBits`` in the place of MatMul and the bias Add behind it."""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import ONNX_DTYPES, Linear, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.weights.quantize import Scheme
from glm4export.weights.recipes import QuantizedPart, Recipe
from glm4export.weights.storage import Formats

# MatMulNBits' accuracy_level: activations are quantized to int8 by block inside the kernel, which is faster on CPUs.
# CUDA's kernels of onnxruntime-gpu 1.31 pass it over; what later ones make of it would change results with the release.
_ACCURACY_INT8 = 4


def linears_left(skeleton: Skeleton, formats: Formats) -> int:
    """How many linears are to be stored as integers: the layers', where no pass has taken them, and the head.

    A classifier's head isn't, nor have features one.
    """
    taken = {"quantize_rows", "quantize_fp8"} & {*skeleton.passed}
    of_layers = 0 if taken or formats.linear_bits == 16 else skeleton.linears_of_layer
    return of_layers * skeleton.config.num_hidden_layers + (skeleton.encoding is None and formats.head_bits != 16)


def _promised(skeleton: Skeleton, formats: Formats, *, int8_activations: bool) -> Counts:
    linears = linears_left(skeleton, formats)
    with_bias = skeleton.linears_of_layer - 3  # q, k and v, apart or in one
    of_layers = linears > 1 and skeleton.config.attention_bias
    return {"linears": linears, "biases": with_bias * skeleton.config.num_hidden_layers if of_layers else 0}


@counts(_promised)
def quantize_linears(skeleton: Skeleton, formats: Formats, *, int8_activations: bool) -> Counts:
    """Counts: ``linears`` quantized, ``biases`` moved into them."""
    linears = biases = 0
    for linear in skeleton.linears():
        if formats.bits(linear.name) == 16:
            _store_half(skeleton, linear)
        else:
            biases += _quantize(skeleton, linear, formats, int8_activations=int8_activations)
            linears += 1
    return {"linears": linears, "biases": biases}


def store_quantized(
    skeleton: Skeleton, anchor: ir.Node, name: str, recipe: Recipe, scheme: Scheme, *, layout: str = "blocks"
) -> list[ir.Value]:
    """Store a matrix [rows, columns] quantized: its data, scales and, where asymmetric, zero points, in that order.

    Scales are stored as float16; the Cast to wider activations is folded when the graph is loaded.
    """
    data = skeleton.weight(f"{name}.data", Recipe(QuantizedPart(recipe.expr, scheme, "data", layout), "uint8"))
    scales = skeleton.weight(f"{name}.scales", Recipe(QuantizedPart(recipe.expr, scheme, "scales"), "float16"))
    if recipe.dtype != "float16":
        to = {"to": int(ONNX_DTYPES[recipe.dtype])}
        scales = skeleton.insert_before(anchor, f"{name}.scales/Cast", "Cast", [scales], to).outputs[0]
    if scheme.symmetric:
        return [data, scales]
    part = QuantizedPart(recipe.expr, scheme, "zero_points")
    return [data, scales, skeleton.weight(f"{name}.zero_points", Recipe(part, "uint8"))]


def _store_half(skeleton: Skeleton, linear: Linear) -> None:
    """Store a weight as float16 and widen it where activations are float32."""
    if linear.dtype == "float16":
        return
    recipe = skeleton.recipes[linear.name]
    del skeleton.graph.initializers[linear.name]
    half = skeleton.weight(linear.name, Recipe(recipe.expr, "float16"))
    to = {"to": int(ONNX_DTYPES[linear.dtype])}
    cast = skeleton.insert_before(linear.node, linear.name.replace(".weight", "/Cast"), "Cast", [half], to)
    linear.node.replace_input_with(1, cast.outputs[0])


def _quantize(skeleton: Skeleton, linear: Linear, formats: Formats, *, int8_activations: bool) -> int:
    rows, columns = linear.weight.shape
    scheme = formats.scheme(linear.name, columns)
    assert scheme is not None, "MatMulNBits takes blocks"
    parts = store_quantized(skeleton, linear.node, linear.name, Recipe(linear.weight, linear.dtype), scheme)
    inputs: list[ir.Value | None] = [linear.input, *parts]
    bias = _bias_add(skeleton, linear.node)
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias.inputs[1]]
    attributes = {
        "K": columns,
        "N": rows,
        "bits": scheme.bits,
        "block_size": scheme.block,
        **({"accuracy_level": _ACCURACY_INT8} if int8_activations else {}),
    }
    name = (linear.node.name or "").replace("/MatMul", "/MatMulNBits")
    skeleton.replace(bias or linear.node, name, "MatMulNBits", inputs, attributes, domain=CONTRIB)
    if bias is not None:
        skeleton.graph.remove(linear.node, safe=True)
    skeleton.model.opset_imports[CONTRIB] = 1
    return int(bias is not None)


def _bias_add(skeleton: Skeleton, matmul: ir.Node) -> ir.Node | None:
    """The Add of a stored bias right behind a matmul, if there is one."""
    users = [use.node for use in matmul.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and any(skeleton.weights_of(users[0])):
        return users[0]
    return None
