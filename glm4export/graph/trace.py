"""The one place that calls torch.export and torch.onnx.

A graph module on the meta device goes in, an ONNX skeleton comes out: initializers have names, shapes and dtypes and no
data. GLM-4-9B's forty layers are traced in less than a gigabyte.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from functools import lru_cache

import onnx
import onnx_ir as ir
import onnxscript
import torch

from glm4export.terminal.quiet import quiet
from glm4graphs import attention
from glm4graphs.config import Glm4Config
from glm4graphs.decode import Decode
from glm4graphs.model import Glm4ForCausalLM, empty_cache
from glm4graphs.prefill import Prefill
from glm4graphs.step import Step
from glm4runtime.contract import (
    ATTENTION_MASK,
    DECODE,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    PREFILL,
    STEP,
    past_name,
    present_name,
)

OPSET = 23  # the first with RMSNormalization
GRAPHS: dict[str, type[Glm4ForCausalLM]] = {PREFILL: Prefill, DECODE: Decode, STEP: Step}

_DIMS = {INPUT_IDS: ("batch", "seq"), ATTENTION_MASK: ("batch", "total_seq"), LOGIT_ROWS: ("batch", "rows")}
_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter leaves each node's module path


def trace(config: Glm4Config, graph: str, *, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    """The skeleton of one graph, ``prefill``, ``decode`` or ``step``, computing in ``dtype``.

    Inputs and outputs have the bundle contract's names. ``max_seq_len`` sizes the rotary tables. Attention is one
    ``glm4::Attention`` node a layer.
    """
    return _traced(config, graph, dtype, max_seq_len).clone()


@lru_cache(maxsize=16)  # listings and tests compile one model in many ways, and tracing takes the longest
def _traced(config: Glm4Config, graph: str, dtype: torch.dtype, max_seq_len: int) -> ir.Model:
    _register_attention_schema()
    untied = dataclasses.replace(config, tie_word_embeddings=False)  # the head's weight is stored apart: transposed
    with torch.device("meta"):
        module = GRAPHS[graph](untied, max_seq_len).to(dtype).eval()
        # torch.export specialises dims of size 0 and 1, and equal ones to each other: all different, all above 1
        inputs = {INPUT_IDS: torch.empty(2, 3, dtype=torch.int64), ATTENTION_MASK: torch.empty(2, 5, dtype=torch.int64)}
        if graph == STEP:
            inputs[LOGIT_ROWS] = torch.empty(2, 11, dtype=torch.int64)
    cache = empty_cache(config, batch=2, max_seq_len=7, dtype=dtype, device="meta")
    batch, slots = torch.export.Dim("batch"), torch.export.Dim("max_seq")
    layer_dims = ({0: batch, 2: slots}, {0: batch, 2: slots})
    dims = [{0: batch, 1: torch.export.Dim(_DIMS[name][1])} for name in inputs]
    arguments, shapes = (*inputs.values(), cache), (*dims, [layer_dims] * config.num_hidden_layers)
    with torch.no_grad(), quiet("torch.onnx"):  # it lists packages GLM-4 does not use
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table={torch.ops.glm4.attention.default: _attention_node},
            verbose=False,
        )
    assert exported is not None  # torch.onnx.export returns None only when it's given a file to write
    model = exported.model
    _name_boundary(model.graph, list(inputs), config)
    _name_dims(model.graph)
    _name_nodes(model.graph)
    model.producer_name, model.producer_version, model.graph.name = "glm4export", "", graph
    return model


def _name_boundary(graph: ir.Graph, inputs: list[str], config: Glm4Config) -> None:
    """Give inputs and outputs the contract's names; the trace orders them as the module's arguments and results."""
    layers = range(config.num_hidden_layers)
    past = [past_name(layer, part) for layer in layers for part in ("key", "value")]
    present = [present_name(layer, part) for layer in layers for part in ("key", "value")]
    for value, name in zip(graph.inputs, [*inputs, *past], strict=True):
        value.name = name
    for value, name in zip(graph.outputs, [LOGITS, *present], strict=True):
        value.name = name


def _name_dims(graph: ir.Graph) -> None:
    """Replace the tracer's symbols (s34, s70) by the dims' names, also inside expressions such as ``s53 - s70``."""
    named = {**_DIMS, past_name(0, "key"): ("batch", "", "max_seq")}
    symbols: dict[str, str] = {}
    for value in graph.inputs:
        for dim, name in zip(value.shape or (), named.get(value.name or "", ()), strict=False):
            if name:
                symbols[str(dim)] = name
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
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


def _register_attention_schema() -> None:
    """Tell onnx of ``glm4::Attention``: the exporter needs an own-domain node's signature before it translates."""
    if onnx.defs.has(attention.OP_TYPE, attention.DOMAIN):
        return
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds = onnx.defs.OpSchema.AttrType
    tensors = [parameter(name, "T") for name in ("query", "key", "value", "past_key", "past_value")]
    mask = parameter("attention_mask", "tensor(int64)")
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            attention.OP_TYPE,
            attention.DOMAIN,
            1,
            inputs=[*tensors, mask, parameter("cos", "T"), parameter("sin", "T")],
            outputs=[parameter(name, "T") for name in ("output", "present_key", "present_value")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[
                attribute("num_heads", kinds.INT, ""),
                attribute("kv_num_heads", kinds.INT, ""),
                attribute("scale", kinds.FLOAT, ""),
            ],
        )
    )
