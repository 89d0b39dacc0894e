"""Store the embedding table smaller than the activations' dtype: float16, or block-quantized.

Only the rows of the prompt's tokens are ever read, so a smaller table costs no time; as float16 it costs no accuracy
that could be seen, since checkpoints are bf16.
"""

from __future__ import annotations

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.passes.quantize_linears import store_quantized
from glm4export.weights.recipes import Recipe
from glm4export.weights.storage import EMBEDDING


def _promised(skeleton: Skeleton) -> Counts:
    formats, recipe = skeleton.formats, skeleton.recipes.get(EMBEDDING)
    already = formats is not None and formats.embedding_bits == 16 and recipe is not None and recipe.dtype == "float16"
    return {"embeddings": int(not already)}


@counts(_promised)
def quantize_embedding(skeleton: Skeleton) -> dict[str, int]:
    """Counts: ``embeddings`` stored in another format than the activations'."""
    formats = skeleton.formats
    assert formats is not None, "a quantizing pipeline is given its formats"
    recipe = skeleton.recipes[EMBEDDING]
    (node,) = (use.node for use in skeleton.graph.initializers[EMBEDDING].uses())
    if formats.embedding_bits == 16 and recipe.dtype == "float16":
        return {"embeddings": 0}
    scheme = formats.scheme(EMBEDDING, recipe.shape[1])
    if scheme is None:
        table_dtype = skeleton.graph.initializers[EMBEDDING].dtype
        assert table_dtype is not None
        half = skeleton.weight(EMBEDDING, Recipe(recipe.expr, "float16"))
        rows = skeleton.insert_before(node, "model.embed_tokens/Rows", "Gather", [half, node.inputs[1]], {"axis": 0})
        to = {"to": int(table_dtype)}
        replacement = skeleton.insert_before(node, "model.embed_tokens/Cast", "Cast", [rows.outputs[0]], to)
    else:
        data, *rest = store_quantized(skeleton, node, EMBEDDING, recipe, scheme, layout="flat")
        replacement = skeleton.insert_before(
            node,
            "model.embed_tokens/GatherBlockQuantized",
            "GatherBlockQuantized",
            [data, node.inputs[1], *rest],
            {"bits": scheme.bits, "block_size": scheme.block, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
        )
        skeleton.model.opset_imports[CONTRIB] = 1
    replacement.outputs[0].shape, replacement.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(replacement.outputs[0])
    skeleton.graph.remove(node, safe=True)
    skeleton.drop_unused_weights()
    return {"embeddings": 1}
