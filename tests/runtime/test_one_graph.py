"""Which graphs a session opens, and that the prefill graph alone computes what the decode graph does, to the bit."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from glm4runtime import BundleError, load
from glm4runtime.backends.graph_check import graphs_to_open
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.backends.side_by_side import side_by_side
from glm4runtime.contract import past_name, present_name, read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.heldout import HELDOUT


@pytest.fixture(scope="module")
def bundles(build_bundle: Build, demo_bundles: dict[str, Path]) -> dict[str, Path]:
    quantized = {precision: build_bundle(None, precision=precision, target="cpu") for precision in ("int8", "int4")}
    return demo_bundles | quantized


def opened(bundle: Path, provider: str = "cpu") -> list[str]:
    with load(bundle, provider=provider, threads=1) as session:  # type: ignore[arg-type]
        assert isinstance(session.runner, OrtRunner)
        return [*session.runner.graphs, session.runner.step_graph]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_one_graph_where_both_have_the_same_weights(precision: str, bundles: dict[str, Path]) -> None:
    assert opened(bundles[precision]) == ["prefill", "prefill"]


def test_both_graphs_where_they_compute_otherwise(build_bundle: Build) -> None:
    model = checkpoints.random_model()
    both = build_bundle(model, precision="int4", target="cpu", prefill_precision="int8")
    assert opened(both) == ["prefill", "decode", "decode"]
    cache = {"precision": "fp16", "kv_cache": "int8", "calibrate": HELDOUT}
    assert opened(build_bundle(None, target="cpu", **cache)) == ["prefill", "decode", "decode"]
    assert opened(build_bundle(None, target="cuda", **cache)) == ["prefill", "prefill"]  # the kernel reads int8 there


def test_both_graphs_where_operators_differ_in_attributes_alone(bundles: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundles["int4"], tmp_path / "copy"))
    assert graphs_to_open(copy, read_manifest(copy)) == ("prefill",)
    model = onnx.load(copy / "decode.onnx", load_external_data=False)
    (epsilon, *_) = (a for node in model.graph.node for a in node.attribute if a.name == "epsilon")
    epsilon.f *= 2
    onnx.save(model, copy / "decode.onnx")
    assert graphs_to_open(copy, read_manifest(copy)) == ("prefill", "decode")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_steps_and_drafts_have_the_decode_graphs_bits(precision: str, bundles: dict[str, Path]) -> None:
    """Against decode.onnx in onnxruntime. In fp16 the prefill graph rounds the last hidden state once more."""
    session = load(bundles[precision], threads=1)
    runner, spec = session.runner, session.manifest.cache
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    decode = ort.InferenceSession(session.folder / "decode.onnx", options)
    names = [(layer, part) for layer in range(spec.layers) for part in ("key", "value")]
    shape = (1, spec.kv_heads, spec.max_seq_len, spec.head_dim)
    past = {past_name(*name): np.zeros(shape, spec.dtype) for name in names}
    outputs = ["logits", *(present_name(*name) for name in names)]
    length, tokens = 0, np.random.default_rng(0).integers(0, session.manifest.vocab_size, 40).tolist()
    runner.rewind()
    for count in (1, 1, 2, 7, 16, 1):
        run = tokens[length : length + count]
        mask = np.ones((1, length + count), np.int64)
        wanted, *presents = decode.run(outputs, {"input_ids": np.array([run]), "attention_mask": mask, **past})
        past = {past_name(*name): value for name, value in zip(names, presents, strict=True)}
        found = runner.decode(run[0])[None] if count == 1 else runner.verify(run)
        assert np.array_equal(found, wanted[0]), f"{count} tokens behind {length}"
        if count > 1:
            for _ in run:
                runner.accept()
        length += count


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_a_graph_that_does_not_open_is_told_in_a_line(
    graph: str, build_bundle: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints.random_model()
    bundle = build_bundle(model, precision="int4", target="cpu", prefill_precision="int8")
    session = load(bundle)
    damaged = session.manifest.graphs[graph].file
    session.close()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = (copy / damaged).read_bytes()
    assert data.count(b"RMSNormalization") > 4
    (copy / damaged).write_bytes(data.replace(b"RMSNormalization", b"RMSNormalizatiom"))
    with pytest.raises(
        BundleError, match=rf"copy/{graph}\.onnx: onnxruntime cannot open it: .*RMSNormalizatiom.*"
    ) as e:
        load(copy)
    assert "\n" not in str(e.value) and "kernels" not in str(e.value)
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")  # the last for Python 3.10
    with pytest.raises(
        BundleError, match=r"; onnxruntime 1\.23\.2 has no kernels for int8 .* take 1\.27 or newer, and"
    ):
        load(copy)


def test_calls_side_by_side() -> None:
    start = time.perf_counter()
    assert side_by_side([lambda: time.sleep(0.2) or 1, lambda: time.sleep(0.2) or 2]) == [1, 2]
    assert time.perf_counter() - start < 0.39

    def fail(text: str, after: float) -> int:
        time.sleep(after)
        raise ValueError(text)

    with pytest.raises(ValueError, match="first"):  # in order of the calls, not of the failures
        side_by_side([partial(fail, "first", 0.1), partial(fail, "second", 0), lambda: 3])
