"""A stand-in for TensorRT's native half, under its own Python front end of quickly deployable plugins.

The front end is the wheel ``tensorrt-cu12-bindings``' ``tensorrt_bindings/plugin``: the decorators' validation and the
templates that TensorRT calls while it builds an engine. Here those calls are made in TensorRT's order, with symbolic
dimensions that can be evaluated, and what the native half asks of the answers is asked: tactics that are unique and
above 0, one output of an aliased input, of its type and shape, and launches within CUDA's limits.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_OPERATIONS = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "SUB": lambda a, b: a - b,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}
DimensionOperation = enum.Enum("DimensionOperation", list(_OPERATIONS))  # type: ignore[misc]
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL"])  # type: ignore[misc]


class IDimensionExpr:
    """A constant, a named dimension, or an operation on two."""

    def __init__(self, value: int | str | tuple[Any, IDimensionExpr, IDimensionExpr]) -> None:
        self.value = value

    def evaluate(self, sizes: dict[str, int]) -> int:
        if isinstance(self.value, int):
            return self.value
        if isinstance(self.value, str):
            return sizes[self.value]
        operation, first, second = self.value
        return int(_OPERATIONS[operation.name](first.evaluate(sizes), second.evaluate(sizes)))

    def is_constant(self) -> bool:
        return isinstance(self.value, int) or (
            isinstance(self.value, tuple) and all(operand.is_constant() for operand in self.value[1:])
        )

    def get_constant_value(self) -> int:
        return self.evaluate({})


class ExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)

    def operation(self, operation: Any, first: IDimensionExpr, second: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr((operation, first, second))


class _Dims(tuple):  # type: ignore[type-arg]
    MAX_DIMS = 8


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[namespace, name]


@dataclass
class _TensorDesc:
    dims: Any = None
    type: Any = None
    format: Any = "LINEAR"
    scale: float = 1.0


@dataclass
class _DynamicDesc:
    desc: _TensorDesc


@dataclass
class _Field:
    name: str
    data: Any
    type: Any


def _module() -> types.ModuleType:
    trt = types.ModuleType("tensorrt")
    interfaces = (
        "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime", "IPluginV3QuickAOTBuild",
        "IPluginCreatorV3Quick", "ITensor", "ISymExpr",
    )  # fmt: skip
    for name in interfaces:
        setattr(trt, name, type(name, (), {}))
    trt.__dict__.update(
        DataType=DataType, float32=DataType["FLOAT"], float16=DataType["HALF"], bfloat16=DataType["BF16"],
        int8=DataType["INT8"], int32=DataType["INT32"], int64=DataType["INT64"], bool=DataType["BOOL"],
        TensorFormat=types.SimpleNamespace(LINEAR="LINEAR"),
        PluginFieldType=enum.Enum("PluginFieldType", [
            "INT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT32", "FLOAT64", "CHAR", "UNKNOWN",
        ]),
        PluginField=_Field, PluginFieldCollection=list, TensorRTPhase=types.SimpleNamespace(BUILD=0),
        QuickPluginCreationRequest=enum.Enum("QuickPluginCreationRequest", [
            "UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT",
        ]),
        PluginArgType=types.SimpleNamespace(INT=0), PluginArgDataType=types.SimpleNamespace(INT8=0, INT16=1, INT32=2),
        IDimensionExpr=IDimensionExpr, DimensionOperation=DimensionOperation, Dims=_Dims,
        DimsExprs=lambda length: [None] * length, PluginTensorDesc=_TensorDesc, DynamicPluginTensorDesc=_DynamicDesc,
        Logger=type("Logger", (), {"WARNING": 1, "log": lambda self, severity, text: None}),
    )  # fmt: skip
    registry = _Registry()
    trt.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
    return trt


@contextmanager
def tensorrt() -> Iterator[types.ModuleType]:
    """``import tensorrt`` gives the stand-in, and ``tensorrt.plugin`` the wheel's front end."""
    found = importlib.util.find_spec("tensorrt_bindings")
    assert found is not None and found.submodule_search_locations
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    trt = _module()
    trt.__path__ = [str(Path(found.submodule_search_locations[0]))]
    sys.modules["tensorrt"] = trt
    try:
        trt.plugin = importlib.import_module("tensorrt.plugin")  # type: ignore[attr-defined]
        yield trt
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)


@dataclass
class _LaunchParams:
    grid_x: Any = None
    grid_y: Any = None
    grid_z: Any = None
    block_x: Any = None
    block_y: Any = None
    block_z: Any = None
    shared_mem: Any = None


class _Setter(dict[int, Any]):
    nbSymExprs = 0


@dataclass
class Built:
    """What an engine would hold of one plugin layer, for one tactic."""

    kernel_name: str
    ptx: str
    params: _LaunchParams
    scalars: list[Any]
    output_types: list[Any]
    output_shapes: list[list[IDimensionExpr]]
    aliases: dict[int, int]
    tactics: list[int] = field(default_factory=list)

    def launch(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], list[int]]:
        """Grid and scalars at those sizes of the dynamic dimensions."""
        grid = tuple(getattr(self.params, f"grid_{axis}").expr.evaluate(sizes) for axis in "xyz")
        assert all(1 <= count <= most for count, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)), grid
        scalars = [scalar.expr.evaluate(sizes) for scalar in self.scalars]
        assert all(-(2**31) <= scalar < 2**31 for scalar in scalars), scalars
        return grid, scalars

    def shapes(self, sizes: dict[str, int]) -> list[list[int]]:
        return [[dim.evaluate(sizes) for dim in shape] for shape in self.output_shapes]


Tensor = tuple[str, Sequence[int | str]]  # a DataType's name, and dims


def build(trt: Any, plugin_id: str, inputs: Sequence[Tensor], attributes: dict[str, Any], tactic: int = 0) -> Built:
    """Create the plugin as TensorRT's ONNX parser does, and call it as its builder does."""
    namespace, name = plugin_id.split("::")
    front_end = importlib.import_module("tensorrt.plugin._lib")
    creator = front_end.QDP_CREATORS[plugin_id]
    assert [entry.name for entry in creator.field_names] == list(attributes)
    fields = [_Field(key, np.array([value]), None) for key, value in attributes.items()]
    plugin = creator.create_plugin(
        name, namespace, fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
    )
    kinds = [DataType[kind] for kind, _ in inputs]
    output_types = plugin.get_output_data_types(kinds, [len(dims) for _, dims in inputs])
    builder = ExprBuilder()
    shapes = plugin.get_output_shapes([[IDimensionExpr(dim) for dim in dims] for _, dims in inputs], [], builder)
    descs = [
        _DynamicDesc(_TensorDesc(_Dims(dim if isinstance(dim, int) else -1 for dim in dims), kind))
        for (_, dims), kind in zip(inputs, kinds, strict=True)
    ]
    for shape, kind in zip(shapes, output_types, strict=True):
        dims = _Dims(dim.get_constant_value() if dim.is_constant() else -1 for dim in shape)
        descs.append(_DynamicDesc(_TensorDesc(dims, kind)))
    supported = plugin.get_supported_format_combinations(descs, len(inputs))
    assert [entry.type for entry in supported] == [desc.desc.type for desc in descs]
    plugin.configure_plugin(descs[: len(inputs)], descs[len(inputs) :])
    tactics = plugin.get_valid_tactics()
    assert len(set(tactics)) == len(tactics) and all(number > 0 for number in tactics), tactics
    plugin.set_tactic(tactic)
    params, setter = _LaunchParams(), _Setter()
    plugin.get_launch_params(None, descs, len(inputs), params, setter, builder)
    kernel_name, ptx = plugin.get_kernel(
        [desc.desc for desc in descs[: len(inputs)]], [desc.desc for desc in descs[len(inputs) :]]
    )
    aliases = {index: plugin.get_aliased_input(index) for index in range(len(output_types))}
    aliased = [source for source in aliases.values() if source >= 0]
    assert len(set(aliased)) == len(aliased), "an input is the alias of one output at most"
    for output, source in aliases.items():
        if source >= 0:
            sizes = {dim: 3 for _, dims in inputs for dim in dims if isinstance(dim, str)}
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in inputs[source][1]]
            assert output_types[output] == kinds[source]
            assert [dim.evaluate(sizes) for dim in shapes[output]] == shape
    blocks = [getattr(params, f"block_{axis}") for axis in "xyz"]
    threads = math.prod(block.expr.evaluate({}) for block in blocks if block is not None)
    assert 0 < threads <= 1024
    assert params.shared_mem.expr.evaluate({}) <= 48 * 1024, "more needs an attribute that TensorRT doesn't set"
    scalars = [setter[index] for index in range(setter.nbSymExprs)]
    return Built(kernel_name, ptx.decode(), params, scalars, output_types, shapes, aliases, tactics)
