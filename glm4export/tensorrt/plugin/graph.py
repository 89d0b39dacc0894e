"""Rewrite a step graph for TensorRT: each ``glm4::Attention`` becomes the three plugins that compute it.

A plugin launches one kernel, and attention needs three in order: rows are appended to the cache, attended to, and where
a sequence was attended to in shares, those are combined. That order is the graph's own, from outputs to inputs, so the
kernels need no synchronisation among their blocks:

    qkv, past ──AppendToCache──► present ──FlashAttention──► attended, shares ──CombineSplits──► attended

``present`` is ``past`` and ``attended`` is ``attended``, each updated in place (aliased, as TensorRT calls it).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from glm4export.passes.lower_attention_standard import AttentionInputs
from glm4graphs.attention import DOMAIN, OP_TYPE
from glm4runtime.contract import UserError

NAMESPACE = DOMAIN
APPEND = "AppendToCache"
ATTEND = "FlashAttention"
COMBINE = "CombineSplits"


def use_plugins(model: ir.Model, *, programs: int) -> int:
    """Replace every ``glm4::Attention`` node, and drop its function; returns how many there were.

    ``programs`` is how many thread blocks the device should be given while it decodes, twice its multiprocessors.
    The engine must be built with ``PreviewFeature.ALIASED_PLUGIN_IO_10_03``, and run with each ``present`` bound to the
    buffer of its ``past``.
    """
    graph = model.graph
    nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    unscaled: ir.Value | None = None
    for node in nodes:
        if len(node.inputs) == len(AttentionInputs._fields):
            scales = list(node.inputs[8:])
        else:
            unscaled = unscaled or _ones(graph, node.attributes["kv_num_heads"].as_int())
            scales = [unscaled, unscaled]
        _replace(graph, node, scales, programs)
    model.functions.pop((DOMAIN, OP_TYPE, ""), None)
    return len(nodes)


def write_plugin_graph(graph: Path, out: Path, *, programs: int) -> None:
    """As :func:`use_plugins`, of a step graph's file; ``out`` is in its folder, and names the same weights file.

    Raises UserError where the graph hasn't one such node for each layer's cache.
    """
    model = ir.load(graph)
    layers = sum(1 for value in model.graph.inputs if (value.name or "").endswith(".key"))
    found = use_plugins(model, programs=programs)
    if found != layers:
        raise UserError(
            f"{graph}: {found} {DOMAIN}::{OP_TYPE} nodes for the caches of {layers} layers; "
            "build the bundle again with --attention plugin"
        )
    ir.save(model, out)


def _replace(graph: ir.Graph, node: ir.Node, scales: list[ir.Value | None], programs: int) -> None:
    qkv, past_key, past_value, positions, indices, mask, cos, sin = node.inputs[:8]
    attended, present_key, present_value = node.outputs
    assert node.name is not None and past_key is not None and past_key.shape is not None
    scope = node.name.removesuffix(f"/{OP_TYPE}")
    head_dim = past_key.shape[3]
    assert isinstance(head_dim, int)

    def plugin(
        op_type: str, inputs: list[ir.Value | None], outputs: list[ir.Value], attributes: Mapping[str, int | float]
    ) -> None:
        fields = {"plugin_namespace": NAMESPACE, "plugin_version": "1", **attributes}
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in fields.items()]
        made = ir.Node(DOMAIN, op_type, inputs, attrs, outputs=outputs, name=f"{scope}/{op_type}")
        graph.insert_before(node, made)

    def taking_over(old: ir.Value) -> ir.Value:
        new = ir.Value(name=old.name, shape=old.shape, type=old.type)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        return new

    keys, values = taking_over(present_key), taking_over(present_value)
    shared = [positions, indices]
    plugin(APPEND, [qkv, past_key, past_value, *shared, cos, sin, *scales], [keys, values], {})
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    scale = node.attributes["scale"].as_float()
    parts = [ir.Value(name=f"{scope}/{ATTEND}:{index}") for index in range(3)]
    plugin(
        ATTEND,
        [qkv, keys, values, *shared, mask, cos, sin, *scales],
        parts,
        {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": head_dim, "scale": scale, "programs": programs},
    )
    plugin(COMBINE, list(parts), [taking_over(attended)], {})
    graph.remove(node, safe=True)


def _ones(graph: ir.Graph, kv_heads: int) -> ir.Value:
    """Scales for a cache that has none: the kernels have the inputs, and don't read them."""
    tensor = ir.tensor([1.0] * kv_heads, dtype=ir.DataType.FLOAT, name="attention/unscaled")
    value = ir.Value(
        name=tensor.name, shape=ir.Shape([kv_heads]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor
    )
    graph.initializers["attention/unscaled"] = value
    return value
