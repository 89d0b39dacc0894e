"""Recipes read window by window are what torch computes on whole tensors, and weights.bin holds their bytes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm4export.sources.config_json import parse_config
from glm4export.terminal.errors import InternalError
from glm4export.weights import recipes
from glm4export.weights import write as weights
from glm4export.weights.quantize import Scheme, quantize, quantize_rows
from glm4export.weights.recipes import (
    Concat,
    Expr,
    QuantizedPart,
    Recipe,
    RotaryTable,
    RowQuantizedPart,
    Scale,
    Source,
    Transpose,
    map_sources,
)
from glm4export.weights.tensors import Window, whole
from glm4export.weights.write import ALIGNMENT, WeightError, lay_out, windows, write_weights
from glm4graphs.rope import rotary_tables
from tests.helpers.configs import config_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tensors(dict[str, Tensor]):
    """A checkpoint in memory; remembers the largest window that was read."""

    largest = 0

    def read(self, name: str, window: Window) -> Tensor:
        data = self[name][tuple(slice(*bounds) for bounds in window)].clone()
        self.largest = max(self.largest, data.numel())
        return data

    def source(self, tensor: Tensor) -> Source:
        name = f"t{len(self)}"
        self[name] = tensor
        return Source(name, tuple(tensor.shape))


def evaluate(expr: Expr, tensors: Tensors) -> Tensor:
    """The whole expression in float64, without windows."""
    if isinstance(expr, Source):
        return tensors[expr.name].double()
    if isinstance(expr, Transpose):
        return evaluate(expr.of, tensors).T
    if isinstance(expr, Concat):
        return torch.cat([evaluate(part, tensors) for part in expr.parts])
    assert isinstance(expr, Scale)
    value = evaluate(expr.of, tensors).clone()
    value[expr.start :] *= expr.factor
    return value


def source(draw: Any, tensors: Tensors, shape: tuple[int, ...]) -> Source:
    generator = torch.Generator().manual_seed(len(tensors))
    data = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    return tensors.source(data)


def expression(draw: Any, tensors: Tensors, shape: tuple[int, ...], depth: int) -> Expr:
    kinds = ["source"]
    if depth:
        kinds += ["scale", *(["transpose"] if len(shape) == 2 else []), *(["concat"] if shape[0] > 1 else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "transpose":
        return Transpose(expression(draw, tensors, shape[::-1], depth - 1))
    if kind == "scale":
        factor = 2.0 ** draw(st.integers(-12, 6))  # two of them take a normal weight nowhere near the end of float16
        return Scale(expression(draw, tensors, shape, depth - 1), factor, draw(st.integers(0, shape[0])))
    if kind == "concat":
        cuts = sorted(draw(st.sets(st.integers(1, shape[0] - 1), max_size=3)))
        rows = [stop - start for start, stop in zip([0, *cuts], [*cuts, shape[0]], strict=True)]
        return Concat(tuple(expression(draw, tensors, (count, *shape[1:]), depth - 1) for count in rows))
    return source(draw, tensors, shape)


@st.composite
def expressions(draw: Any) -> tuple[Expr, Tensors]:
    tensors = Tensors()
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
    return expression(draw, tensors, shape, draw(st.integers(0, 4))), tensors


@settings(max_examples=300, deadline=None)
@given(case=expressions(), data=st.data())
def test_any_window_is_a_slice_of_the_whole(case: tuple[Expr, Tensors], data: st.DataObject) -> None:
    expr, tensors = case
    expected = evaluate(expr, tensors)
    assert expr.shape == tuple(expected.shape)
    window = []
    for size in expr.shape:
        start = data.draw(st.integers(0, size - 1))
        window.append((start, data.draw(st.integers(start + 1, size))))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = expr.read(tensors, tuple(window))
    assert torch.equal(found.double(), expected[tuple(slice(*bounds) for bounds in window)])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


@settings(max_examples=150, deadline=None)
@given(case=expressions(), elements=st.integers(1, 40))
def test_windows_cover_the_whole_in_order(case: tuple[Expr, Tensors], elements: int) -> None:
    expr, tensors = case
    cut = list(windows(expr.shape, elements))
    row = math.prod(expr.shape[1:])
    for window in cut:
        size = math.prod(stop - start for start, stop in window)
        assert size <= max(elements, row) and size % row == 0
    found = torch.cat([expr.read(tensors, window).double() for window in cut])
    assert torch.equal(found, evaluate(expr, tensors))


@pytest.mark.parametrize("function", ["cos", "sin"])
def test_rotary_table(function: str) -> None:
    config = parse_config(config_of(), "c")
    table = RotaryTable(function, config, 64, 12)
    expected = rotary_tables(config, 64)[0 if function == "cos" else 1]
    assert table.shape == (64, 12)
    found = table.read(Tensors(), ((5, 64), (2, 12)))
    assert torch.equal(found[:, :6], expected[5:64, 2:8])
    assert (found[:, 6:] == (1 if function == "cos" else 0)).all()  # angle 0 rotates nothing


@pytest.mark.parametrize("factor", [0.0, 3.0, -2.0, 0.1, 1 + 2**-20, math.inf, math.nan])
def test_scale_refuses_what_is_not_exact(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"scale factor {factor} is not a power of two"):
        Scale(Source("w", (2, 2)), factor)


def test_scale_does_not_lose_a_float16_subnormal() -> None:
    tensors = Tensors()
    tiny = torch.tensor([[2.0**-24, -3 * 2.0**-24, 2.0**-14, 65504.0]], dtype=torch.float16)
    down = Scale(tensors.source(tiny), 2.0**-7)
    assert torch.equal(down.read(tensors, whole(down.shape)).double(), tiny.double() / 128)
    there_and_back = Scale(down, 2.0**7)
    assert torch.equal(there_and_back.read(tensors, whole(down.shape)).half(), tiny)


def test_recipes_read_as_text() -> None:
    q, k = Source("q.weight", (4, 8)), Source("k.weight", (2, 8))
    recipe = Recipe(Transpose(Concat((Scale(q, 2.0**-7), Scale(k, 4.0, start=1)))), "float16")
    assert str(recipe) == "float16(transpose(concat(scale(q.weight, 2^-7), scale(k.weight, 2^2, rows 1:))))"
    assert (recipe.shape, recipe.nbytes, recipe.torch_dtype) == ((8, 6), 96, torch.float16)
    assert str(RotaryTable("cos", parse_config(config_of(), "c"), 64, 8)) == "rotary_cos(64 x 8)"


def test_map_sources_reaches_every_leaf() -> None:
    a, b, table = Source("a", (2, 3)), Source("b", (2, 3)), RotaryTable("sin", parse_config(config_of(), "c"), 2, 3)
    expr = Transpose(Scale(Concat((a, Transpose(Transpose(b)), table)), 0.5, start=1))
    mapped = map_sources(expr, lambda leaf: Scale(leaf, 2.0))
    assert str(mapped) == (
        "transpose(scale(concat(scale(a, 2^1), transpose(transpose(scale(b, 2^1))), rotary_sin(2 x 3)), 2^-1, rows 1:))"
    )


@dataclass(frozen=True)
class Unheard:
    """An expression that somebody added without telling those who walk over expressions."""

    of: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, reader: Any, window: Any) -> torch.Tensor:
        return self.of.read(reader, window)

    def __str__(self) -> str:
        return f"unheard({self.of})"


def test_an_expression_that_nobody_knows_is_an_error() -> None:
    strange = Unheard(Source("a", (2, 32)))
    with pytest.raises(
        InternalError, match=r"recipe unheard\(a\): no pass knows how to change a Unheard\. This is a mis"
    ):
        map_sources(Transpose(Concat((strange,))), lambda leaf: leaf)
    scheme = Scheme(4, 32, True, torch.float16)
    with pytest.raises(InternalError, match=r"unheard\(a\): what came quantized can't be found below a Unheard"):
        QuantizedPart(Concat((strange,)), scheme, "data").read(Tensors(), ((0, 2), (0, 1)))


def test_a_window_of_a_rotary_table_computes_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = parse_config(config_of(), "c"), []

    def tables(config: Any, positions: int, first: int = 0) -> Any:
        asked.append(positions - first)
        return rotary_tables(config, positions, first)

    monkeypatch.setattr(recipes, "rotary_tables", tables)
    table = RotaryTable("sin", config, 2**24, 16)  # a gigabyte
    rows = table.read(Tensors(), ((40, 60), (3, 16)))
    assert asked == [20]
    assert torch.equal(rows[:, :5], rotary_tables(config, 64)[1][40:60, 3:])
    assert not rows[:, 5:].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_weights_file_holds_each_recipe_at_its_page(data: st.DataObject, tmp_path_factory: Any) -> None:
    tensors, recipes = Tensors(), {}
    for index in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=2)))
        dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
        recipes[f"w{index}"] = Recipe(expression(data.draw, tensors, shape, 2), dtype)
    path = tmp_path_factory.mktemp("weights") / "weights.bin"
    layout, told = lay_out(recipes), []
    spec = write_weights(path, recipes, layout, tensors, told.append)
    content = path.read_bytes()
    assert spec.size == layout.size == len(content)
    assert spec.sha256 == hashlib.sha256(content).hexdigest()
    assert sum(told) == sum(recipe.nbytes for recipe in recipes.values())
    end = 0
    for name, recipe in recipes.items():
        offset = layout.offsets[name]
        assert offset % ALIGNMENT == 0 and end <= offset < end + ALIGNMENT
        assert content[end:offset] == bytes(offset - end)
        end = offset + recipe.nbytes
        expected = evaluate(recipe.expr, tensors).to(torch.float32).to(recipe.torch_dtype).flatten()
        assert (
            content[offset:end]
            == expected.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        )
    assert end == len(content)


@pytest.mark.parametrize("kind", ["rows", "blocks"])
def test_quantized_matrices_are_never_whole_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what quantizing at once gives, by windows of 700 weights read and, next, stored."""
    monkeypatch.setattr(weights, "QUANTIZED_ELEMENTS", 700)
    generator, tensors = torch.Generator().manual_seed(0), Tensors()
    halves = [torch.randn(rows, 96, generator=generator) for rows in (37, 11)]
    matrix = Concat(tuple(tensors.source(half) for half in halves))
    scheme = Scheme(4, 32, symmetric=False)
    if kind == "rows":
        data, scales = quantize_rows(torch.cat(halves))
        recipes = {
            "data": Recipe(RowQuantizedPart(matrix, "data"), "int8"),
            "scales": Recipe(RowQuantizedPart(matrix, "scales"), "float32"),
        }
        expected = {"data": data.T.contiguous(), "scales": scales}
    else:
        recipes = {
            part: Recipe(QuantizedPart(matrix, scheme, part), "float32" if part == "scales" else "uint8")
            for part in ("data", "scales", "zero_points")
        }
        expected = vars(quantize(torch.cat(halves), scheme))
    layout, told = lay_out(recipes), []
    write_weights(tmp_path / "w", recipes, layout, tensors, told.append)
    content = (tmp_path / "w").read_bytes()
    for name, tensor in expected.items():
        stored = content[layout.offsets[name] : layout.offsets[name] + recipes[name].nbytes]
        assert stored == tensor.numpy().tobytes()
    assert tensors.largest <= 700
    assert max(told) <= 700
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_stored_dtype_is_cast_once(source_dtype: torch.dtype, dtype: str, tmp_path: Path) -> None:
    tensors = Tensors()
    values = torch.tensor([1.0, -0.1, 1e-7, 6e4, 1 / 3]).to(source_dtype)
    recipes = {"w": Recipe(tensors.source(values), dtype)}
    write_weights(tmp_path / "w", recipes, lay_out(recipes), tensors, lambda size: None)
    expected = values.float().numpy().astype(dtype)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w", dtype), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 65520.0, -1e5])
def test_values_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    tensors = Tensors()
    values = torch.ones(64, 64)
    values[63, 63] = bad
    recipes = {
        "fine": Recipe(tensors.source(torch.ones(3)), "float16"),
        "bad.weight": Recipe(tensors.source(values), "float16"),
    }
    with pytest.raises(WeightError, match=r"^bad\.weight: a value is not finite in float16; .*--precision fp32$"):
        write_weights(tmp_path / "w", recipes, lay_out(recipes), tensors, lambda size: None)


def test_a_float32_file_takes_numbers_beyond_float16(tmp_path: Path) -> None:
    tensors = Tensors()
    recipes = {"w": Recipe(tensors.source(torch.tensor([1e5, -3e38])), "float32")}
    assert write_weights(tmp_path / "w", recipes, lay_out(recipes), tensors, lambda size: None).size == 8


def test_what_fp32_does_not_hold_is_no_reason_for_fp32(tmp_path: Path) -> None:
    tensors = Tensors()
    recipes = {"w": Recipe(tensors.source(torch.tensor([1.0, math.nan])), "float32")}
    with pytest.raises(
        WeightError, match=r"^w: a value .* the checkpoint holds NaN or infinity there; fetch or save it"
    ):
        write_weights(tmp_path / "w", recipes, lay_out(recipes), tensors, lambda size: None)
