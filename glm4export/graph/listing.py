"""Readable listings of compiled graphs: what reviewers read, and what ``graphs/golden`` keeps."""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton


def listing(skeleton: Skeleton) -> str:
    """A graph as text: boundary, weights with their recipes, then one line per node in execution order."""
    graph = skeleton.graph
    opsets = ", ".join(
        f"{domain or 'ai.onnx'} {number}" for domain, number in sorted(skeleton.model.opset_imports.items())
    )
    lines = [f"graph {graph.name}, opset {opsets}", "", "inputs"]
    lines += [f"  {_declared(value)}" for value in graph.inputs]
    lines += ["", "outputs", *(f"  {_declared(value)}" for value in graph.outputs)]
    lines += [
        "",
        "weights",
        *(f"  {name} {list(recipe.shape)} = {recipe}" for name, recipe in skeleton.recipes.items()),
    ]
    lines += ["", "nodes", *(f"  {_node(node)}" for node in graph)]
    return "\n".join(lines) + "\n"


def _declared(value: ir.Value) -> str:
    dims = ", ".join(str(dim) for dim in value.shape or ())
    return f"{value.name} {value.dtype} [{dims}]"


def _node(node: ir.Node) -> str:
    outputs = ", ".join(f"%{value.name}" for value in node.outputs)
    inputs = ", ".join(_operand(value) for value in node.inputs)
    attributes = ", ".join(f"{name}={node.attributes[name].value}" for name in sorted(node.attributes))
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{outputs} = {operator}({inputs})" + (f" {{{attributes}}}" if attributes else "")


def _operand(value: ir.Value | None) -> str:
    if value is None:
        return "-"
    if value.const_value is not None:
        return str(value.const_value.numpy().tolist())
    return f"%{value.name}"
