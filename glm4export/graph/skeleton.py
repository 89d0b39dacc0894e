"""A skeleton: one traced graph without data, and the recipes of its weights. What passes rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

from glm4export.weights.recipes import Expr, Recipe, Transpose
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import Encoding
from glm4runtime.contract import DTYPES


class Linear(NamedTuple):
    """A MatMul by a weight of the checkpoint, which is stored as MatMul takes it: transposed."""

    node: ir.Node
    input: ir.Value  # [..., in]
    name: str  # of the stored weight
    weight: Expr  # [out, in], as checkpoints have it
    dtype: str  # that it's stored in


@dataclass
class Skeleton:
    """An ONNX graph whose initializers have no data, and for each of them the recipe that makes it."""

    model: ir.Model
    config: Glm4Config
    max_seq_len: int
    encoding: Encoding | None = None  # of a graph without a cache
    recipes: dict[str, Recipe] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)  # names of the passes that it went through, in order

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @property
    def linears_of_layer(self) -> int:
        """Matrices that a layer multiplies by: o, gate_up, down, and q, k, v until fuse_qkv makes them one."""
        return 4 if "fuse_qkv" in self.passed else 6

    def nodes(self, op_type: str, domain: str = "") -> list[ir.Node]:
        """Every node of that type, in graph order."""
        return [node for node in self.graph if node.op_type == op_type and node.domain == domain]

    def weight(self, name: str, recipe: Recipe) -> ir.Value:
        """Add an initializer made by ``recipe``."""
        value = ir.val(name, ONNX_DTYPES[recipe.dtype], recipe.shape)
        self.graph.initializers[name] = value
        self.recipes[name] = recipe
        return value

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a small initializer that carries its data in the graph."""
        value = ir.val(name, const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def insert_before(
        self,
        anchor: ir.Node,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | float | Sequence[int]] | None = None,
        *,
        domain: str = "",
        outputs: Sequence[ir.Value] | None = None,
    ) -> ir.Node:
        """Insert a node; its first output is called ``name`` too unless ``outputs`` are given."""
        outputs = [ir.val(name)] if outputs is None else outputs
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=name)
        self.graph.insert_before(anchor, node)
        return node

    def replace(
        self,
        old: ir.Node,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | float | Sequence[int]] | None = None,
        *,
        domain: str = "",
    ) -> ir.Node:
        """Put another node in the place of one: its outputs get the old ones' names, shapes, types and readers."""
        outputs = [ir.val(value.name) for value in old.outputs]
        node = self.insert_before(old, name, op_type, inputs, attributes, domain=domain, outputs=outputs)
        self.replace_outputs(old, outputs)
        return node

    def replace_outputs(self, old: ir.Node, values: Sequence[ir.Value]) -> None:
        """Remove a node whose outputs other nodes make now: these get the old ones' names, shapes, types, readers."""
        ir.convenience.replace_nodes_and_values(self.graph, old, [old], [], old.outputs, values)

    def linears(self) -> Iterator[Linear]:
        """Every linear whose weight is still stored as computed with, the head included, in graph order."""
        for node in self.nodes("MatMul"):
            for name in self.weights_of(node):
                recipe, x = self.recipes[name], node.inputs[0]
                assert isinstance(recipe.expr, Transpose) and x is not None, "lift_weights stores linears transposed"
                yield Linear(node, x, name, recipe.expr.of, recipe.dtype)

    def drop_unused_weights(self) -> None:
        """Forget initializers, and their recipes, that no node reads."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]
                self.recipes.pop(name, None)

    def weights_of(self, node: ir.Node) -> Iterator[str]:
        """Names of the initializers that a node reads."""
        for value in node.inputs:
            if value is not None and value.name in self.recipes:
                yield value.name


ONNX_DTYPES = {name: ir.DataType(dtype.number) for name, dtype in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in ONNX_DTYPES.items()}
