"""Store linears block-quantized: ``com.microsoft::MatMulNBits`` in the place of MatMul and the bias Add behind it."""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import ONNX_DTYPES, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.weights.quantize import Scheme
from glm4export.weights.recipes import QuantizedPart, Recipe, Transpose
from glm4export.weights.storage import Formats

_ACCURACY_INT8 = 4  # MatMulNBits' accuracy_level: activations are quantized to int8 by block inside the kernel


def linears_left(skeleton: Skeleton) -> int:
    """How many linears are to be stored as integers: the layers', where no pass has taken them, and the head."""
    formats = skeleton.formats
    assert formats is not None, "a quantizing pipeline is given its formats"
    taken = {"quantize_rows", "quantize_fp8"} & {*skeleton.passed}
    of_layers = 0 if taken or formats.linear_bits == 16 else skeleton.linears_of_layer
    return of_layers * skeleton.config.num_hidden_layers + (formats.head_bits != 16)


def _promised(skeleton: Skeleton) -> Counts:
    linears = linears_left(skeleton)
    with_bias = skeleton.linears_of_layer - 3  # q, k and v, apart or in one
    of_layers = linears > 1 and skeleton.config.attention_bias
    return {"linears": linears, "biases": with_bias * skeleton.config.num_hidden_layers if of_layers else 0}


@counts(_promised)
def quantize_linears(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``linears`` quantized, ``biases`` moved into them."""
    formats = skeleton.formats
    assert formats is not None, "a quantizing pipeline is given its formats"
    linears = biases = 0
    for node in skeleton.nodes("MatMul"):
        stored = next(skeleton.weights_of(node), None)
        if stored is None:
            continue
        if formats.bits(stored) == 16:
            _store_half(skeleton, node, stored)
        else:
            biases += _quantize(skeleton, node, stored, formats)
            linears += 1
    skeleton.drop_unused_weights()
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


def _store_half(skeleton: Skeleton, node: ir.Node, stored: str) -> None:
    """Store a weight as float16 and widen it where activations are float32."""
    recipe = skeleton.recipes[stored]
    if recipe.dtype == "float16":
        return
    original = skeleton.graph.initializers.pop(stored)
    half = skeleton.weight(stored, Recipe(recipe.expr, "float16"))
    assert original.dtype is not None
    cast = skeleton.insert_before(node, stored.replace(".weight", "/Cast"), "Cast", [half], {"to": int(original.dtype)})
    original.replace_all_uses_with(cast.outputs[0])


def _quantize(skeleton: Skeleton, node: ir.Node, stored: str, formats: Formats) -> int:
    recipe = skeleton.recipes[stored]
    assert isinstance(recipe.expr, Transpose), "lift_weights stores every linear transposed"
    expr = recipe.expr.of  # [out, in], as MatMulNBits wants it
    rows, columns = expr.shape
    scheme = formats.scheme(stored, columns)
    assert scheme is not None, "MatMulNBits takes blocks"
    parts = store_quantized(skeleton, node, stored, Recipe(expr, recipe.dtype), scheme)
    inputs: list[ir.Value | None] = [node.inputs[0], *parts]
    last, bias = node, _bias_add(skeleton, node)
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias.inputs[1]]
        last = bias
    result = last.outputs[0]
    output = ir.Value(name=result.name, shape=result.shape, type=result.type)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    attributes = {
        "K": columns,
        "N": rows,
        "bits": scheme.bits,
        "block_size": scheme.block,
        "accuracy_level": _ACCURACY_INT8,
    }
    name = (node.name or "").replace("/MatMul", "/MatMulNBits")
    skeleton.insert_before(last, name, "MatMulNBits", inputs, attributes, domain=CONTRIB, outputs=[output])
    for replaced in (last, node) if bias is not None else (node,):
        skeleton.graph.remove(replaced, safe=True)
    skeleton.model.opset_imports[CONTRIB] = 1
    return int(bias is not None)


def _bias_add(skeleton: Skeleton, matmul: ir.Node) -> ir.Node | None:
    """The Add of a stored bias right behind a matmul, if there is one."""
    users = [use.node for use in matmul.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and any(skeleton.weights_of(users[0])):
        return users[0]
    return None
