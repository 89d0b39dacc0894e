"""Cut a lowered graph into stages, each with some of the layers: ``--stages``.

A stage is a graph of its own. It takes the residual stream in front of its first layer, ``stream.{layer}`` [batch, seq,
hidden], from the stage before, as that computed it: in the dtype of activations, and scaled as fp16's is. The first one
has the embedding, the last one the final norm and the head; what all layers read of the inputs, each computes for
itself. Every pass has run by then, so stages compute what the whole graph does, node by node. (ONNX Runtime computes
fp16 on a CPU in float32, and rounds between graphs but not between most nodes: stages round the stream once more.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.terminal.errors import InternalError
from glm4runtime.contract import LOGITS, present_name, stage_name, stream_name

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_FUSED = "SkipSimplifiedLayerNormalization"


def cut_stages(skeletons: Mapping[str, Skeleton], stages: int) -> tuple[tuple[int, ...], dict[str, Skeleton]]:
    """How many layers each stage has, and the stages of all graphs by name; the graphs themselves are used up.

    stages: at most as many as layers.
    """
    layers = split(layer_bytes(list(skeletons.values())), stages)
    ends = list(accumulate(layers, initial=0))
    cut: dict[str, Skeleton] = {}
    for name, skeleton in skeletons.items():
        for layer in ends[1:-1]:
            _name_stream(skeleton, layer)
        for index, (first, end) in enumerate(pairwise(ends)):
            cut[stage_name(name, index)] = _stage(skeleton, first, end)
    return layers, cut


def layer_bytes(skeletons: Sequence[Skeleton]) -> list[int]:
    """Stored bytes of every layer over all graphs, the first one with the embedding, the last one with the head."""
    counted: set[tuple[str, int]] = set()
    sizes = [0] * skeletons[0].config.num_hidden_layers
    for skeleton in skeletons:
        for name, recipe in skeleton.recipes.items():
            for layer in _readers(skeleton.graph.initializers[name], last=len(sizes) - 1):
                sizes[layer] += recipe.nbytes * ((name, layer) not in counted)
                counted.add((name, layer))
    return sizes


def _readers(weight: ir.Value, last: int) -> set[int]:
    """Layers that count a weight: a tied table is looked up at the one end and multiplied by at the other."""
    if found := _LAYER.match(weight.name or ""):
        return {int(found[1])}
    return {0 if use.node.op_type in _LOOKUPS else last for use in weight.uses()}


def split(costs: Sequence[int], parts: int) -> tuple[int, ...]:
    """Lengths of so many runs of ``costs``, none of them empty, whose dearest is as cheap as can be."""

    @cache
    def best(first: int, parts: int) -> tuple[int, int, tuple[int, ...]]:
        own = sum(costs[first:])
        if parts == 1:
            return own, own**2, (len(costs) - first,)
        found = []
        for end in range(first + 1, len(costs) - parts + 2):
            own = sum(costs[first:end])
            most, squares, lengths = best(end, parts - 1)
            found.append((max(own, most), own**2 + squares, (end - first, *lengths)))  # of equals the most even
        return min(found)

    return best(0, parts)[2]


def _name_stream(skeleton: Skeleton, layer: int) -> None:
    """Have the stream in front of a layer by its name."""
    weight = f"model.layers.{layer}.input_layernorm.weight"
    gamma = skeleton.graph.initializers[weight]
    norm = next((use.node for use in gamma.uses()), None)
    if norm is None or norm.op_type not in ("RMSNormalization", _FUSED):
        raise InternalError(f"the {skeleton.graph.name} graph has no norm in front of layer {layer}, where it is cut")
    stream = _unfused(skeleton, norm) if norm.op_type == _FUSED else norm.inputs[0]
    assert stream is not None and gamma.dtype is not None
    stream.name = stream_name(layer)
    stream.shape = ir.Shape(("batch", "seq", skeleton.config.hidden_size))
    stream.type = ir.TensorType(gamma.dtype)


def _unfused(skeleton: Skeleton, fused: ir.Node) -> ir.Value:
    """Sum and norm in two nodes again, for two stages; returns the sum."""
    x, skip, gamma = fused.inputs
    normed, *_, total = fused.outputs
    stem = (fused.name or "").removesuffix(_FUSED)
    added = skeleton.insert_before(fused, f"{stem}Add", "Add", [x, skip]).outputs[0]
    attributes = {"axis": -1, "epsilon": fused.attributes["epsilon"].value}
    norm = skeleton.insert_before(fused, f"{stem}RMSNormalization", "RMSNormalization", [added, gamma], attributes)
    total.replace_all_uses_with(added)
    normed.replace_all_uses_with(norm.outputs[0])
    skeleton.graph.remove(fused, safe=True)
    return added


def _stage(skeleton: Skeleton, first: int, end: int) -> Skeleton:
    """Layers ``first`` to ``end`` as a graph: of the whole one's inputs those that it reads, of its outputs its own."""
    whole, layers = skeleton.graph, skeleton.config.num_hidden_layers
    own = {present_name(layer, part) for layer in range(first, end) for part in ("key", "value")}
    taken = [stream_name(first)] if first else []
    given = [stream_name(end)] if end < layers else [LOGITS]
    outputs = [*given, *(value.name for value in whole.outputs if value.name in own)]
    graph = ir.convenience.extract(whole, [*taken, *(value.name or "" for value in whole.inputs)], outputs)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    initializers = {name: graph.initializers[name] for name in whole.initializers if name in graph.initializers}
    graph.initializers.clear()
    graph.initializers.update(initializers)  # in their order
    recipes = {name: recipe for name, recipe in skeleton.recipes.items() if name in initializers}
    strange = [name for name in recipes if (found := _LAYER.match(name)) and not first <= int(found[1]) < end]
    if strange:
        raise InternalError(f"the {whole.name} graph, cut in front of layer {first}, still reads {', '.join(strange)}")
    model = ir.Model(graph, ir_version=skeleton.model.ir_version, producer_name=skeleton.model.producer_name)
    return Skeleton(model, skeleton.config, skeleton.max_seq_len, None, recipes, list(skeleton.passed))
