"""Give the residual stream as outputs, ``hidden_states.{i}`` float32 [batch, seq, hidden], as transformers does.

The first is what the first layer reads, the embeddings; the others are what each layer made of it, the last one normed.
They are of every token, whichever rows a head gets.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4runtime.contract import hidden_state_name

NORM = "model.norm.weight"


@counts(lambda skeleton, residual: {"states": skeleton.config.num_hidden_layers + 1})
def give_hidden_states(skeleton: Skeleton, residual: float) -> Counts:
    """Counts: ``states`` given. ``residual`` scales the stream, and what leaves it is divided by that again."""
    norms = {next(skeleton.weights_of(node)): node for node in skeleton.nodes("RMSNormalization")}
    layers, dims = skeleton.config.num_hidden_layers, ("batch", "seq", skeleton.config.hidden_size)
    for index in range(layers):
        stream = norms[f"model.layers.{index}.input_layernorm.weight"].inputs[0]
        assert stream is not None
        give(skeleton, hidden_state_name(index), stream, dims, 1 / residual)
    give(skeleton, hidden_state_name(layers), _normed(skeleton, norms[NORM]), dims)
    return {"states": layers + 1}


def _normed(skeleton: Skeleton, norm: ir.Node) -> ir.Value:
    """Every row of the stream behind the final norm, which itself may get some of them only."""
    stream = norm.inputs[0]
    while stream is not None and (producer := stream.producer()) is not None and producer.op_type != "Add":
        stream = producer.inputs[0]
    if stream is norm.inputs[0]:
        return norm.outputs[0]
    attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
    inputs = [stream, norm.inputs[1]]
    every = skeleton.insert_before(norm, "hidden_states/RMSNormalization", norm.op_type, inputs, attributes)
    every.outputs[0].type = norm.outputs[0].type
    return every.outputs[0]


def give(
    skeleton: Skeleton, name: str, value: ir.Value, dims: Sequence[str | int | ir.SymbolicDim], factor: float = 1.0
) -> None:
    """Give a value of the graph as an output too, in float32 and multiplied by ``factor``, which fp16 may not hold."""
    narrow = value.dtype != ir.DataType.FLOAT
    nodes = [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}) if narrow else ir.node("Identity", [value])]
    if factor != 1:
        scale = skeleton.constant(f"{name}/scale", ir.tensor(factor, dtype=ir.DataType.FLOAT))
        nodes.append(ir.node("Mul", [nodes[0].outputs[0], scale]))
    for node in nodes:
        node.name = node.outputs[0].name = f"{name}/{node.op_type}"
    output = nodes[-1].outputs[0]
    output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, ir.Shape(dims)
    skeleton.graph.extend(nodes)
    skeleton.graph.outputs.append(output)
