"""OpenVINO as a foreign runtime: it runs the bundles' own graphs, unchanged, and computes what onnxruntime computes.

Both get the same tokens: a prompt through ``prefill.onnx``, then one by one through ``decode.onnx``, each over its own
cache. OpenVINO's presents come out as long as the text; onnxruntime's are as long as the pasts it was given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from glm4runtime.contract import (
    ATTENTION_MASK,
    DECODE,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    PREFILL,
    past_name,
    present_name,
    read_manifest,
)
from glm4runtime.text.tokenizer import Tokenizer
from tests.conftest import Build

TEXT = "[gMASK]<sop><|user|>\nWhat is the capital of France?<|assistant|>\nThe capital of France is Paris."
PROMPT = 12  # tokens of it that go through prefill
CAPACITY = 64
Feed = dict[str, np.ndarray]
Run = Callable[[Feed], Feed]  # from inputs to outputs, by name
Opened = tuple[list[str], Run]  # a graph: the inputs it takes, and how to run it


@pytest.fixture(scope="module")
def open_openvino() -> Callable[[Path], Opened]:
    """Opens a graph in OpenVINO, computing in fp32 as onnxruntime does (by itself it takes bf16 where it's fast)."""
    # Without this package, which OpenVINO's import sends an event with, OpenVINO goes on without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    core, settings = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}

    def open_graph(path: Path) -> Opened:
        compiled = core.compile_model(path, "CPU", settings)

        def run(feed: Feed) -> Feed:
            found = compiled(feed)
            return {value.any_name: np.array(found[value]) for value in compiled.outputs}

        return [value.any_name for value in compiled.inputs], run

    return open_graph


def open_onnxruntime(path: Path) -> Opened:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]

    def run(feed: Feed) -> Feed:
        return dict(zip(names, session.run(names, feed), strict=True))

    return [value.name for value in session.get_inputs()], run


def last_logits(open_graph: Callable[[Path], Opened], bundle: Path, ids: list[int]) -> np.ndarray:
    """Logits behind the prompt and behind each token after it, [len(ids) - PROMPT + 1, vocab]."""
    manifest, rows = read_manifest(bundle), []
    spec = manifest.cache
    shape = (1, spec.kv_heads, CAPACITY, spec.head_dim)
    parts = [(layer, part) for layer in range(spec.layers) for part in ("key", "value")]
    cache = {past_name(*part): np.zeros(shape, spec.dtype) for part in parts}
    graphs = {name: open_graph(bundle / manifest.graphs[name].file) for name in (PREFILL, DECODE)}
    for start, stop in [(0, PROMPT), *((end, end + 1) for end in range(PROMPT, len(ids)))]:
        takes, run = graphs[PREFILL if start == 0 else DECODE]
        feed = {INPUT_IDS: np.array([ids[start:stop]]), ATTENTION_MASK: np.ones((1, stop), np.int64)} | cache
        if LOGIT_ROWS in takes:
            feed[LOGIT_ROWS] = np.array([[stop - start - 1]])
        found = run(feed)
        rows.append(found[LOGITS][0, -1])
        for part in parts:
            cache[past_name(*part)][:, :, :stop] = found[present_name(*part)][:, :, :stop]
    return np.array(rows)


@pytest.mark.parametrize(("precision", "correlation"), [("fp32", 1 - 1e-9), ("int4", 0.998)])
def test_embedded_model(
    precision: str,
    correlation: float,
    build_bundle: Build,
    demo_bundles: dict[str, Path],
    open_openvino: Callable[[Path], Opened],
) -> None:
    bundle = demo_bundles.get(precision) or build_bundle(None, precision=precision, target="cpu")
    ids = Tokenizer.from_file(bundle / "tokenizer.json").encode(TEXT)
    wanted, found = last_logits(open_onnxruntime, bundle, ids), last_logits(open_openvino, bundle, ids)
    assert len(wanted) == len(ids) - PROMPT + 1 > 4
    assert min(np.corrcoef(*rows)[0, 1] for rows in zip(wanted, found, strict=True)) > correlation
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
