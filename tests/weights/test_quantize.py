"""Block-wise quantization: ONNX Runtime's own kernels read the bytes, and the search keeps its promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from glm4export.weights import quantize as module
from glm4export.weights.quantize import (
    Quantized,
    Scheme,
    block_for,
    pack,
    quantize,
    quantize_rows,
    unpack,
)
from glm4export.weights.storage import Formats
from glm4runtime.contract import UserError
from tests.helpers.dequantize import dequantize

SCHEMES = [
    Scheme(bits, block, symmetric) for bits in (4, 8) for block in (16, 32, 64, 128) for symmetric in (True, False)
]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, off centre, of different size from row to row."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) + 0.1
    return (normal * normal.abs() + 0.2) * scale


def absmax(weight: Tensor, scheme: Scheme) -> Tensor:
    """What plain rounding gives: Q4_0's rule for symmetric blocks, the range from least to largest for others."""
    blocks = weight.view(weight.shape[0], -1, scheme.block)
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    levels, half = 2**scheme.bits, 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        scale, zero_point = torch.where(high > -low, high, low) / -half, torch.tensor(float(half))
    else:
        scale = (high.clamp(min=0) - low.clamp(max=0)) / (levels - 1)
        zero_point = (-low.clamp(max=0) / scale).nan_to_num().round()
    q = ((blocks / scale).nan_to_num().round() + zero_point).clamp(0, levels - 1)
    return ((q - zero_point) * scale).view_as(weight)


def error(weight: Tensor, found: Tensor, importance: Tensor | None = None) -> float:
    squares = (weight.double() - found.double()).square()
    return float((squares if importance is None else squares * importance).sum())


def run_node(op_type: str, inputs: dict[str, np.ndarray], graph_input: str, **attributes: Any) -> np.ndarray:
    """Run one com.microsoft node; every input but ``graph_input`` is an initializer."""
    data = inputs[graph_input]
    node = helper.make_node(op_type, [*inputs], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(graph_input, helper.np_dtype_to_tensor_dtype(data.dtype), data.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items() if name != graph_input],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {graph_input: data})
    return np.asarray(y)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_matmulnbits_reads_the_layout(scheme: Scheme, blocks: int) -> None:
    rows, columns = 24, blocks * scheme.block
    quantized = quantize(weights(rows, columns), scheme)
    x = np.random.default_rng(0).standard_normal((5, columns), dtype=np.float32)
    inputs = {"x": x, "data": quantized.data.numpy(), "scales": quantized.scales.numpy()}
    if quantized.zero_points is not None:
        inputs["zero_points"] = quantized.zero_points.numpy()
    shape = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": scheme.block}
    wanted = x @ dequantize(quantized, scheme).numpy().T
    exact = run_node("MatMulNBits", inputs, "x", accuracy_level=0, **shape)
    np.testing.assert_allclose(exact, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    int8_activations = run_node("MatMulNBits", inputs, "x", accuracy_level=4, **shape)
    assert np.abs(int8_activations - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gatherblockquantized_reads_the_same_bytes(scheme: Scheme) -> None:
    rows, columns = 9, 3 * scheme.block
    quantized = quantize(weights(rows, columns), scheme)
    inputs = {
        "data": quantized.data.flatten(1).numpy(),
        "ids": np.array([[0, 8, 3], [3, 1, 7]]),
        "scales": quantized.scales.numpy(),
    }
    if quantized.zero_points is not None:
        inputs["zero_points"] = quantized.zero_points.numpy()
    found = run_node(
        "GatherBlockQuantized",
        inputs,
        "ids",
        bits=scheme.bits,
        block_size=scheme.block,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_allclose(found, dequantize(quantized, scheme).numpy()[inputs["ids"]], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(-12, 12),
    offset=st.sampled_from([0.0, 0.5, -3.0]),
)
def test_never_worse_than_plain_rounding(scheme: Scheme, seed: int, spread: float, offset: float) -> None:
    weight = (weights(8, 2 * scheme.block, seed) + offset) * 10**spread
    found = dequantize(quantize(weight, scheme), scheme)
    per_row = [(error(w, f), error(w, a)) for w, f, a in zip(weight, found, absmax(weight, scheme), strict=True)]
    assert all(ours <= plain * (1 + 1e-4) for ours, plain in per_row)


@settings(max_examples=20, deadline=None)
@given(scheme=st.sampled_from([scheme for scheme in SCHEMES if scheme.bits == 4]), seed=st.integers(0, 2**32 - 1))
def test_importance_lowers_the_weighted_error(scheme: Scheme, seed: int) -> None:
    weight = weights(16, 2 * scheme.block, seed)
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)).pow(6)
    plain = dequantize(quantize(weight, scheme), scheme)
    aware = dequantize(quantize(weight, scheme, importance), scheme)
    assert error(weight, aware, importance) < error(weight, plain, importance)


def test_the_search_gains_on_absmax() -> None:
    """On normal weights Q4_0's rule makes 1.13 times the search's squared error."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    q4_0 = error(weight, absmax(weight, Scheme(4, 32)))
    assert error(weight, dequantize(quantize(weight, Scheme(4, 32)), Scheme(4, 32))) < q4_0 / 1.12


def identical(a: Quantized, b: Quantized) -> bool:
    pairs = ((a.data, b.data), (a.scales, b.scales), (a.zero_points, b.zero_points))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def part(whole: Quantized, first: int, last: int) -> Quantized:
    zero_points = None if whole.zero_points is None else whole.zero_points[first:last]
    return Quantized(whole.data[first:last], whole.scales[first:last], zero_points)


@settings(max_examples=15, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(2, 40),
    blocks=st.integers(1, 5),
    chunk=st.integers(1, 5000),
    aware=st.booleans(),
    cut=st.floats(0, 1),
)
def test_windows_chunks_and_threads_change_no_bit(
    scheme: Scheme, rows: int, blocks: int, chunk: int, aware: bool, cut: float
) -> None:
    weight = weights(rows, blocks * scheme.block).bfloat16()
    importance = torch.rand(weight.shape[1]) if aware else None
    whole, at = quantize(weight, scheme, importance), int(cut * rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", chunk)
        assert identical(quantize(weight, scheme, importance), whole)
    assert identical(quantize(weight[:at], scheme, importance), part(whole, 0, at))
    assert identical(quantize(weight[at:], scheme, importance), part(whole, at, rows))


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        weight = weights(4, 1 << 19)
        many = quantize(weight, Scheme(4, 128))
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert identical(quantize(weight, Scheme(4, 128)), many)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_representable_weights_stay(scheme: Scheme) -> None:
    """Weights that lie on a grid whose end they use come back as they were."""
    scheme = Scheme(scheme.bits, scheme.block, scheme.symmetric, torch.float16)
    generator = torch.Generator().manual_seed(0)
    levels = 2**scheme.bits
    q = torch.randint(0, levels, (16, 4, scheme.block), generator=generator)
    q[..., 0], q[..., 1] = 0, levels - 1
    zero_points = torch.full((16, 4, 1), levels // 2)
    if not scheme.symmetric:
        zero_points = torch.randint(0, levels, (16, 4, 1), generator=generator)
    scales = torch.randn(16, 4, 1, generator=generator).half().float()
    weight = ((q - zero_points) * scales).flatten(1)
    torch.testing.assert_close(dequantize(quantize(weight, scheme), scheme), weight, rtol=0, atol=0)


def test_integers_are_chosen_for_the_rounded_scale() -> None:
    weight = weights(32, 512)
    full, half = Scheme(8, 64), Scheme(8, 64, scale_dtype=torch.float16)
    quantized = quantize(weight, half)
    assert torch.equal(quantized.scales, quantized.scales.half().float())
    naive = quantize(weight, full)
    naive.scales = naive.scales.half().float()
    assert error(weight, dequantize(quantized, half)) < error(weight, dequantize(naive, full))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_odd_blocks(scheme: Scheme) -> None:
    """Blocks of zeros, of one sign, of a single weight, denormal, huge."""
    weight = torch.zeros(6, scheme.block)
    weight[1, 3] = -5.0
    weight[2] = torch.linspace(1.0, 2.0, scheme.block)
    weight[3] = -weight[2]
    weight[4] = 1e-42
    weight[5] = weight[2] * 1e33
    found = dequantize(quantize(weight, scheme), scheme)
    assert found.isfinite().all()
    assert (found[0] == 0).all() and (found[4].abs() < 1e-36).all()
    torch.testing.assert_close(found[1], weight[1], rtol=1e-6, atol=0)
    levels = 15 if scheme.bits == 4 else 255
    for row, scale in ((2, 1.0), (3, 1.0), (5, 1e33)):
        assert (found[row] - weight[row]).abs().max() <= 2.2 * scale * (0.7 if scheme.bits == 4 else 1.1) / (levels / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    weight = weights(2, 64)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, Scheme(4, 32))
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(weight)
    with pytest.raises(ValueError, match=r"beyond torch.float16's range"):
        quantize(weights(2, 64) * 1e9, Scheme(4, 32, scale_dtype=torch.float16))


@pytest.mark.parametrize(
    ("bits", "block", "symmetric", "stored"),
    [(4, 32, True, 4.5), (4, 128, True, 4.125), (4, 128, False, 4.15625), (8, 128, True, 8.125)],
    ids=["Q4_0's", "int4", "asymmetric", "int8"],
)
def test_stored_bits_per_weight(bits: int, block: int, symmetric: bool, stored: float) -> None:
    formats = Formats(bits, head_bits=8, embedding_bits=16, block=block, symmetric=symmetric)
    assert 8 * formats.nbytes("down_proj.weight", 512, 4096) == stored * 512 * 4096


def test_blocks_that_divide_the_columns() -> None:
    assert [block_for(c) for c in (13696, 4096, 192, 96, 48)] == [128, 128, 64, 32, 16]
    assert block_for(4096, 32) == 32
    with pytest.raises(UserError, match="a weight of 100 columns can't be quantized"):
        block_for(100)
    for wrong in ({"bits": 3, "block": 32}, {"bits": 4, "block": 48}, {"bits": 4, "block": 8}):
        with pytest.raises(ValueError, match="is not"):
            Scheme(**wrong)
    with pytest.raises(ValueError, match="no multiple of the block size 64"):
        quantize(weights(2, 96), Scheme(4, 64))


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([4, 8]))
def test_packing_is_undone(rows: int, count: int, bits: int) -> None:
    values = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8)
    assert torch.equal(unpack(pack(values, bits), bits, count), values)


def test_rows() -> None:
    weight = weights(40, 300)
    weight[7] = 0
    weight[8, 0] = 40.0  # an outlier, which the search clips in favour of the rest where that pays
    data, scales = quantize_rows(weight)
    assert data.dtype == torch.int8 and data.abs().max() <= 127
    absmax_scale = weight.abs().amax(1, keepdim=True) / 127
    plain = (weight / absmax_scale).nan_to_num().round() * absmax_scale
    found = data.float() * scales[:, None]
    assert error(weight, found) < error(weight, plain)
    assert (found[7] == 0).all()
    torch.testing.assert_close(found, weight, rtol=0, atol=float(weight.abs().max()) / 127)
    again, _ = quantize_rows(weight[5:9])
    assert torch.equal(again, data[5:9])
