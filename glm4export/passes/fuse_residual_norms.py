"""Add a block's output to the residual stream and normalise the sum in one node, as CUDA has a kernel for it.

``com.microsoft::SkipSimplifiedLayerNormalization(x, skip, gamma)`` gives ``RMSNorm(x + skip)`` and, as its fourth
output, ``x + skip``. ONNX Runtime makes it of Add and SimplifiedLayerNormalization in graphs of older opsets only.

The final norm stays as it is: in the prefill graph it reads chosen rows, and a session opens one graph only where both
read each weight by the same operator.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB


@counts(lambda skeleton: {"norms": 2 * skeleton.config.num_hidden_layers - 1})
def fuse_residual_norms(skeleton: Skeleton) -> Counts:
    """Counts: ``norms`` that read a sum. The first layer's input norm reads the embeddings."""
    norms = {next(skeleton.weights_of(node)): node for node in skeleton.nodes("RMSNormalization")}
    fused = 0
    for layer in range(skeleton.config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = norms.get(f"model.layers.{layer}.{name}.weight")
            stream = None if norm is None else norm.inputs[0]
            add = None if stream is None else stream.producer()
            if norm is not None and add is not None and add.op_type == "Add":
                _fuse(skeleton, add, norm)
                fused += 1
    if fused:
        skeleton.model.opset_imports[CONTRIB] = 1
    return {"norms": fused}


def _fuse(skeleton: Skeleton, add: ir.Node, norm: ir.Node) -> None:
    """Put one node where the sum was made: other readers of the sum stand behind it, whichever comes first."""
    normed, total = ir.val(norm.outputs[0].name), ir.val(add.outputs[0].name)
    skeleton.insert_before(
        add,
        (norm.name or "").replace("RMSNormalization", "SkipSimplifiedLayerNormalization"),
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes["epsilon"].value},
        domain=CONTRIB,
        outputs=[normed, ir.val(""), ir.val(""), total],
    )
    skeleton.replace_outputs(norm, [normed])
    skeleton.replace_outputs(add, [total])
