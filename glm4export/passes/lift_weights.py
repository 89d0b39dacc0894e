"""Give every initializer a recipe, and move the Transpose that precedes each MatMul into it.

The exporter writes a linear as ``MatMul(x, Transpose(weight))``. Stored transposed, the node is gone, and no runtime
has to fold it by holding both copies.
"""

from __future__ import annotations

from glm4export.graph.skeleton import DTYPE_NAMES, Skeleton
from glm4export.passes.counted import Counts, counts
from glm4export.sources.ledger import tensor_shapes
from glm4export.weights.recipes import Expr, Recipe, RotaryTable, Source, Transpose
from glm4export.weights.storage import EMBEDDING, HEAD, SCORE


def _promised(skeleton: Skeleton) -> Counts:
    outer, layer = tensor_shapes(skeleton.config, skeleton.encoding)
    layers, tables = skeleton.config.num_hidden_layers, 2  # of cos and sin
    return {
        "weights": len(outer) + layers * len(layer) + tables,
        "transposes": skeleton.linears_of_layer * layers + sum(name in (HEAD, SCORE) for name in outer),
    }


@counts(_promised)
def lift_weights(skeleton: Skeleton) -> Counts:
    """Counts: ``weights`` initializers given a recipe, ``transposes`` folded into one."""
    graph = skeleton.graph
    for name, value in graph.initializers.items():
        assert value.shape is not None and value.dtype is not None
        shape = value.shape.numpy()
        value.const_value = None  # the trace's placeholder on the meta device
        skeleton.recipes[name] = Recipe(_source(skeleton, name, shape), DTYPE_NAMES[value.dtype])
    transposes = [node for node in skeleton.nodes("Transpose") if any(skeleton.weights_of(node))]
    for node in transposes:
        stored = node.inputs[0]
        assert stored is not None and stored.name is not None
        recipe = skeleton.recipes[stored.name]
        folded = Recipe(Transpose(recipe.expr), recipe.dtype)
        del graph.initializers[stored.name]
        node.outputs[0].replace_all_uses_with(skeleton.weight(stored.name, folded))
        graph.remove(node, safe=True)
    return {"weights": len(skeleton.recipes), "transposes": len(transposes)}


def _source(skeleton: Skeleton, name: str, shape: tuple[int, ...]) -> Expr:
    if name in ("model.rotary_cos", "model.rotary_sin"):
        return RotaryTable(name.removeprefix("model.rotary_"), skeleton.config, *shape)
    if name == HEAD and skeleton.config.tie_word_embeddings:
        return Source(EMBEDDING, shape)  # the same data; the head needs it transposed
    return Source(name, shape)
