"""onnxscript's optimizer on the skeleton: constant folding, dead nodes, sequences back into Split.

It sees no weight data (initializers carry none yet), so it is as quick for a large model as for a small one.
"""

from __future__ import annotations

from onnxscript import optimizer

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.terminal.quiet import quiet

_SEQUENCES = ("SplitToSequence", "SequenceAt")  # what the exporter writes for torch.split


def _promised(skeleton: Skeleton) -> Counts:
    of_heads = {"lower_attention_standard", "lower_attention_full", "lower_attention_bias"}
    of_layer = 2 if of_heads & {*skeleton.passed} else 1  # gate and up; and q, k and v
    return {"splits": of_layer * skeleton.config.num_hidden_layers, "sequences": 0}


@counts(_promised)
def simplify(skeleton: Skeleton) -> Counts:
    """Counts: ``removed`` nodes, ``splits`` there are now, and ``sequences`` left of what they're made of."""
    before = len(skeleton.graph)
    with quiet("onnx_ir"):  # it warns of every initializer without data
        optimizer.optimize(skeleton.model)
    sequences = sum(len(skeleton.nodes(op_type)) for op_type in _SEQUENCES)
    return {"removed": before - len(skeleton.graph), "splits": len(skeleton.nodes("Split")), "sequences": sequences}
