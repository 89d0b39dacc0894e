"""Take embeddings, ``inputs_embeds`` float32 [batch, seq, hidden], in the place of token ids.

The table isn't stored: whoever gives embeddings has it, or made them in another way.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.terminal.errors import InternalError
from glm4export.weights.storage import EMBEDDING
from glm4runtime.contract import INPUT_IDS, INPUTS_EMBEDS


@counts(lambda skeleton, residual: {"embeddings": 1})
def take_embeddings(skeleton: Skeleton, residual: float) -> Counts:
    """Counts: ``embeddings`` tables that left. ``residual`` scales the stream, and so what enters it."""
    inputs, (lookup,) = skeleton.graph.inputs, (use.node for use in skeleton.graph.initializers[EMBEDDING].uses())
    index = next(i for i, value in enumerate(inputs) if value.name == INPUT_IDS)
    given = ir.val(INPUTS_EMBEDS, ir.DataType.FLOAT, ["batch", "seq", skeleton.config.hidden_size])
    stream, dtype = given, lookup.outputs[0].dtype
    if residual != 1:
        factor = skeleton.constant(f"{INPUTS_EMBEDS}/scale", ir.tensor(residual, dtype=ir.DataType.FLOAT))
        stream = skeleton.insert_before(lookup, f"{INPUTS_EMBEDS}/Mul", "Mul", [stream, factor]).outputs[0]
    if dtype is not None and dtype != ir.DataType.FLOAT:
        to = {"to": int(dtype)}
        stream = skeleton.insert_before(lookup, f"{INPUTS_EMBEDS}/Cast", "Cast", [stream], to).outputs[0]
    lookup.outputs[0].replace_all_uses_with(stream)
    skeleton.graph.remove(lookup, safe=True)
    if readers := ", ".join(sorted({use.node.op_type for use in inputs[index].uses()})):
        raise InternalError(f"{skeleton.graph.name} graph: its {INPUT_IDS} are read by {readers}, not looked up alone")
    inputs[index] = given
    return {"embeddings": 1}
