"""The one place that calls torch.export and torch.onnx.

A graph module on the meta device goes in, an ONNX skeleton comes out: initializers have names, shapes and dtypes and no
data. GLM-4-9B's forty layers are traced in less than a gigabyte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import onnxscript
import torch

from glm4export.graph.signature import SIGNATURES, Signature, encoder_signature
from glm4export.terminal.quiet import quiet
from glm4graphs import attention
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import EncoderGraph, Encoding
from glm4graphs.graphs import GRAPHS, Graph
from glm4runtime.contract import ATTENTION_MASK, MODEL, GraphName

OPSET = 23  # the first with RMSNormalization

_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter leaves each node's module path


def trace(config: Glm4Config, graph: GraphName, *, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    """The skeleton of one graph, ``prefill``, ``decode`` or ``step``, computing in ``dtype``.

    Inputs and outputs are those of its signature. ``max_seq_len`` sizes the rotary tables. Attention is one
    ``glm4::Attention`` node per layer.
    """
    with torch.device("meta"):
        module = Graph(config, max_seq_len, *GRAPHS[graph])
    return _export(config, graph, module, SIGNATURES[graph], dtype)


def trace_encoder(config: Glm4Config, encoding: Encoding, *, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    """The same of the graph without a cache, ``model``: attention is one ``glm4::FullAttention`` node per layer."""
    with torch.device("meta"):
        module = EncoderGraph(config, max_seq_len, encoding)
    return _export(config, MODEL, module, encoder_signature(encoding), dtype)


def _export(
    config: Glm4Config, graph: str, module: torch.nn.Module, signature: Signature, dtype: torch.dtype
) -> ir.Model:
    _register_schemas()
    arguments, shapes = signature.example(config, dtype)
    module = module.to(dtype).eval()
    with torch.no_grad(), quiet("torch.onnx"):  # it lists packages GLM-4 does not use
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table={
                torch.ops.glm4.attention.default: _attention_node,
                torch.ops.glm4.full_attention.default: _full_attention_node,
            },
            verbose=False,
        )
    assert exported is not None  # torch.onnx.export returns None only when it's given a file to write
    model = exported.model
    _name_boundary(model.graph, signature, config)
    _name_nodes(model.graph)
    model.producer_name, model.producer_version, model.graph.name = "glm4export", "", graph
    return model.clone()  # numbers the nodes that passes add from 0, not from however many the exporter made


def _name_boundary(graph: ir.Graph, signature: Signature, config: Glm4Config) -> None:
    """Give inputs and outputs the signature's names, and symbols its dims', also in expressions (``s53 - s70``)."""
    symbols: dict[str, str] = {}
    for value, (name, dims) in zip(graph.inputs, signature.named_inputs(config).items(), strict=True):
        value.name = name
        for symbol, dim in zip(value.shape or (), dims, strict=True):
            if isinstance(dim, str):
                symbols[str(symbol)] = dim
    for value, name in zip(graph.outputs, signature.named_outputs(config), strict=True):
        value.name = name
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                dim if isinstance(dim, int) else pattern.sub(lambda match: symbols[match[0]], str(dim))
                for dim in value.shape
            )


def _name_nodes(graph: ir.Graph) -> None:
    """Name nodes and values by the module they came from, and drop the exporter's notes (they hold local paths)."""
    seen: Counter[str] = Counter()
    boundary = {id(value) for value in graph.outputs}
    for node in graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
        scope = scopes[-2] if len(scopes) > 1 else ""  # the last one is the operator itself
        if scope.startswith("_"):  # the tracer's own placeholder for nodes of no module
            scope = ""
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
        node.meta.clear()
        for index, output in enumerate(node.outputs):
            if id(output) not in boundary:
                output.name = node.name if index == 0 else f"{node.name}:{index}"
            output.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _attention_node(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    past_key,
    past_value,
    attention_mask,
    cos,
    sin,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
):
    return onnxscript.values.Opset(attention.DOMAIN, 1).Attention(
        query,
        key,
        value,
        past_key,
        past_value,
        attention_mask,
        cos,
        sin,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )


def _full_attention_node(  # type: ignore[no-untyped-def]
    query, key, value, attention_mask, cos, sin, num_heads: int, kv_num_heads: int, scale: float
):
    return onnxscript.values.Opset(attention.DOMAIN, 1).FullAttention(
        query,
        key,
        value,
        attention_mask,
        cos,
        sin,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )


def _register_schemas() -> None:
    """Tell onnx of our operators: the exporter needs an own-domain node's signature before it translates."""
    projected, past, present = ("query", "key", "value"), ("past_key", "past_value"), ("present_key", "present_value")
    inputs, scales = (*projected, *past, ATTENTION_MASK, "cos", "sin"), ("key_scale", "value_scale")
    _register_schema(attention.OP_TYPE, inputs, ("output", *present), scales)  # of an int8 cache: TensorRT's plugin
    _register_schema(attention.FULL_OP_TYPE, (*projected, ATTENTION_MASK, "cos", "sin"), ("output",))


def _register_schema(op_type: str, inputs: Sequence[str], outputs: Sequence[str], scales: Sequence[str] = ()) -> None:
    """``scales`` are inputs that a node may lack."""
    if onnx.defs.has(op_type, attention.DOMAIN):
        return
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds, optional = onnx.defs.OpSchema.AttrType, onnx.defs.OpSchema.FormalParameterOption.Optional
    taken = [parameter(name, "tensor(int64)" if name == ATTENTION_MASK else "T") for name in inputs]
    taken += [parameter(name, "tensor(float)", param_option=optional) for name in scales]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            op_type,
            attention.DOMAIN,
            1,
            inputs=taken,
            outputs=[parameter(name, "T") for name in outputs],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[
                attribute("num_heads", kinds.INT, ""),
                attribute("kv_num_heads", kinds.INT, ""),
                attribute("scale", kinds.FLOAT, ""),
            ],
        )
    )
