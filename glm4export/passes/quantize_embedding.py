"""Store the embedding table smaller than the activations' dtype: float16, or block-quantized.

Only the rows of the prompt's tokens are ever read, so a smaller table costs no time; as float16 it costs no accuracy
that could be seen, since checkpoints are bf16.
"""

from __future__ import annotations

from glm4export.graph.skeleton import ONNX_DTYPES, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.passes.quantize_linears import store_quantized
from glm4export.weights.recipes import Recipe
from glm4export.weights.storage import EMBEDDING, Formats


def _promised(skeleton: Skeleton, formats: Formats) -> Counts:
    return {"embeddings": int(formats.embedding_bits != 16 or skeleton.recipes[EMBEDDING].dtype != "float16")}


@counts(_promised)
def quantize_embedding(skeleton: Skeleton, formats: Formats) -> Counts:
    """Counts: ``embeddings`` stored in another format than the activations'."""
    recipe = skeleton.recipes[EMBEDDING]
    (node,) = (use.node for use in skeleton.graph.initializers[EMBEDDING].uses())
    if formats.embedding_bits == 16 and recipe.dtype == "float16":
        return {"embeddings": 0}
    scheme = formats.scheme(EMBEDDING, recipe.shape[1])
    if scheme is None:
        half = skeleton.weight(EMBEDDING, Recipe(recipe.expr, "float16"))
        rows = skeleton.insert_before(node, "model.embed_tokens/Rows", "Gather", [half, node.inputs[1]], {"axis": 0})
        to = {"to": int(ONNX_DTYPES[recipe.dtype])}
        new = skeleton.replace(node, "model.embed_tokens/Cast", "Cast", [rows.outputs[0]], to)
    else:
        data, *rest = store_quantized(skeleton, node, EMBEDDING, recipe, scheme, layout="flat")
        new = skeleton.replace(
            node,
            "model.embed_tokens/GatherBlockQuantized",
            "GatherBlockQuantized",
            [data, node.inputs[1], *rest],
            {"bits": scheme.bits, "block_size": scheme.block, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
        )
        skeleton.model.opset_imports[CONTRIB] = 1
    new.outputs[0].name = new.name  # not the old node's, which is gone
    return {"embeddings": 1}
