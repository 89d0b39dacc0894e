"""ONNX files without the onnx package: read, and a small one written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from glm4runtime import BundleError
from glm4runtime.backends.matmul_model import matmul_model
from glm4runtime.contract.onnxfile import read_graph


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_graphs_are_read_as_onnx_reads_them(precision: str, name: str, bundles: dict[str, Path]) -> None:
    found = read_graph(bundles[precision] / name)
    graph = onnx.load(bundles[precision] / name, load_external_data=False).graph
    assert [(node.op, node.inputs) for node in found.nodes] == [(n.op_type, tuple(n.input)) for n in graph.node]
    integers = [{a.name: a.i for a in n.attribute if a.type == onnx.AttributeProto.INT} for n in graph.node]
    assert [node.integers for node in found.nodes] == integers
    assert {name: (t.dtype, t.shape) for name, t in found.stored.items()} == {
        t.name: (onnx.helper.tensor_dtype_to_np_dtype(t.data_type).name, tuple(t.dims)) for t in graph.initializer
    }
    for tensor in graph.initializer:
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        assert found.stored[tensor.name].nbytes == (lengths[0] if lengths else len(tensor.raw_data))


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 20, b"not an ONNX file", b"cut"])
def test_a_damaged_graph(data: bytes, bundles: dict[str, Path], tmp_path: Path) -> None:
    whole = (bundles["fp32"] / "decode.onnx").read_bytes()
    (tmp_path / "x.onnx").write_bytes(whole[: len(whole) // 2] if data == b"cut" else data)
    with pytest.raises(BundleError, match=r"x\.onnx: not a readable ONNX graph \(.*\); build the bundle again"):
        read_graph(tmp_path / "x.onnx")


@pytest.mark.parametrize(("given", "stored"), [(np.float32, np.float32), (np.uint8, np.int8)])
def test_matmul_model(given: Any, stored: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 100, (3, 200)).astype(given), rng.integers(-100, 100, (200, 5)).astype(stored)
    model = matmul_model(b)
    onnx.checker.check_model(onnx.load_from_string(model))
    (result,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"A": a})
    np.testing.assert_array_equal(result, a.astype(np.int64) @ b.astype(np.int64))
