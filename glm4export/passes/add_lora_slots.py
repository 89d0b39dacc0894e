"""Side paths for LoRA adapters that a session loads: ``y = W x + ((x Aᵀ) · gate) B`` beside every linear of a layer.

A and B are inputs, with a default of no rows: a graph that is given none computes the base model, and other runtimes
run it unchanged. The gate, an input too, says which of their rows each sequence of a batch uses: one product over the
adapters of a whole batch, each read once. Zeros in the gate make exact zeros, so a sequence's numbers are its own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from glm4export.graph.skeleton import ONNX_DTYPES, Linear, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.weights.storage import HEAD
from glm4runtime.contract import LORA_GATE, LORA_MODULES, LORA_QKV_GATE, lora_name


@counts(lambda skeleton, dtype: {"linears": len(LORA_MODULES) * skeleton.config.num_hidden_layers})
def add_lora_slots(skeleton: Skeleton, dtype: str) -> Counts:
    """Counts: ``linears`` that got a side path in ``dtype``, activations' own. After fuse_qkv, before quantization."""
    gates = {
        LORA_QKV_GATE: _input(skeleton, LORA_QKV_GATE, dtype, ["batch", 1, "lora_qkv_rows"]),
        LORA_GATE: _input(skeleton, LORA_GATE, dtype, ["batch", 1, "lora_rows"]),
    }
    linears = [linear for linear in skeleton.linears() if linear.name != HEAD]
    for linear in linears:
        _add_side_path(skeleton, linear, dtype, gates)
    return {"linears": len(linears)}


def _input(skeleton: Skeleton, name: str, dtype: str, dims: list[int | str]) -> ir.Value:
    """An input that need not be given: its default has no rows."""
    shape = [1 if dim == "batch" else 0 if isinstance(dim, str) else dim for dim in dims]
    default = ir.Tensor(np.zeros(shape, ONNX_DTYPES[dtype].numpy()), dtype=ONNX_DTYPES[dtype], name=name)
    value = ir.Value(name=name, type=ir.TensorType(ONNX_DTYPES[dtype]), shape=ir.Shape(dims), const_value=default)
    skeleton.graph.inputs.append(value)
    skeleton.graph.initializers[name] = value
    return value


def _add_side_path(skeleton: Skeleton, linear: Linear, dtype: str, gates: dict[str, ir.Value]) -> None:
    _, _, layer, _, module, _ = linear.name.split(".")  # model.layers.0.self_attn.qkv_proj.weight
    out, inner = linear.weight.shape
    gate, rows = (LORA_QKV_GATE, "lora_qkv_rows") if module == "qkv_proj" else (LORA_GATE, "lora_rows")
    a = _input(skeleton, lora_name(int(layer), module, "A"), dtype, [rows, inner])
    b = _input(skeleton, lora_name(int(layer), module, "B"), dtype, [rows, out])
    scope = linear.name.removesuffix("weight") + "lora"

    def add(name: str, op_type: str, inputs: list[ir.Value], **attributes: list[int]) -> ir.Value:
        return skeleton.insert_before(linear.node, f"{scope}/{name}", op_type, inputs, attributes).outputs[0]

    down = add("Down", "MatMul", [linear.input, add("Transpose", "Transpose", [a], perm=[1, 0])])
    side = add("Up", "MatMul", [add("Gate", "Mul", [down, gates[gate]]), b])
    last = _with_bias(skeleton, linear.node)
    base = last.outputs[0]
    total = ir.node("Add", [base, side], outputs=[ir.val(f"{scope}/Add")], name=f"{scope}/Add")
    base.replace_all_uses_with(total.outputs[0])
    total.replace_input_with(0, base)
    skeleton.graph.insert_after(last, total)


def _with_bias(skeleton: Skeleton, matmul: ir.Node) -> ir.Node:
    """The Add of a stored bias behind a matmul, or the matmul where it has none."""
    users = [use.node for use in matmul.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and any(skeleton.weights_of(users[0])):
        return users[0]
    return matmul
