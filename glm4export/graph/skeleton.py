"""A skeleton: one traced graph without data, and the recipes of its weights. What passes rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from glm4export.weights.fp16 import Fp16Scales
from glm4export.weights.recipes import Recipe
from glm4export.weights.storage import Formats
from glm4graphs.config import Glm4Config
from glm4runtime.contract import DTYPES


@dataclass
class Skeleton:
    """An ONNX graph whose initializers have no data, and for each of them the recipe that makes it."""

    model: ir.Model
    config: Glm4Config
    max_seq_len: int
    fp16_scales: Fp16Scales | None = None
    formats: Formats | None = None
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
        kind = ir.TensorType(ONNX_DTYPES[recipe.dtype])
        value = ir.Value(name=name, shape=ir.Shape(recipe.shape), type=kind)
        self.graph.initializers[name] = value
        self.recipes[name] = recipe
        return value

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a small initializer that carries its data in the graph."""
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
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
        if outputs is None:
            outputs = [ir.Value(name=name)]
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in (attributes or {}).items()]
        node = ir.Node(domain, op_type, inputs, attrs, outputs=outputs, name=name)
        self.graph.insert_before(anchor, node)
        return node

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
