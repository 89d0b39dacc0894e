"""Give every layer's attention weights as outputs, ``attentions.{i}`` float32 [batch, heads, seq, total_seq].

GroupQueryAttention's CPU kernel gives them behind the softmax, as transformers does; the cache's padding with them.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import ONNX_DTYPES, Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.passes.give_hidden_states import NORM, give
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4runtime.contract import ATTENTION_MASK, attention_name

_WEIGHTS = 3  # which output of the operator they are
_AFTER_SOFTMAX = 2


@counts(per_layer(attentions=1))
def give_attentions(skeleton: Skeleton) -> Counts:
    """Counts: ``attentions`` given."""
    nodes = skeleton.nodes("GroupQueryAttention", CONTRIB)
    mask = next(value for value in skeleton.graph.inputs if value.name == ATTENTION_MASK)
    assert mask.shape is not None
    batch, total = mask.shape
    for layer, node in enumerate(nodes):
        node.attributes["qk_output"] = ir.AttrInt64("qk_output", _AFTER_SOFTMAX)
        given = len(node.outputs)
        node.resize_outputs(_WEIGHTS + 1)
        for index, output in enumerate(node.outputs[given:_WEIGHTS], given):  # a cache that nobody reads
            output.name = f"{node.name}:{index}"
        weights = node.outputs[_WEIGHTS]
        weights.name, weights.dtype = f"{node.name}/weights", ONNX_DTYPES[skeleton.recipes[NORM].dtype]
        give(skeleton, attention_name(layer), weights, (batch, skeleton.config.num_attention_heads, "seq", total))
    return {"attentions": len(nodes)}
