"""int8 prefill rounds activations to 8 bits where this machine's kernels sum exactly, and to the file's 7 elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from glm4export import machine
from glm4runtime import load
from glm4runtime.backends import int8_range
from glm4runtime.contract import read_manifest
from tests.conftest import Build

TOKENS = list(range(5, 45))


@pytest.fixture(scope="module")
def bundle(build_bundle: Build) -> Path:
    return build_bundle(None, precision="int4", target="cpu", prefill_precision="int8")


def logits(bundle: Path, **options: Any) -> np.ndarray:
    with load(bundle, threads=1, **options) as session:
        return session.runner.prefill(TOKENS).copy()


def as_in_the_file(bundle: Path) -> np.ndarray:
    """The graph's logits in a session of onnxruntime that knows nothing of us."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session, cache = ort.InferenceSession(bundle / "prefill.onnx", options), read_manifest(bundle).cache
    empty = np.zeros((1, cache.kv_heads, len(TOKENS), cache.head_dim), cache.dtype)
    past = {node.name: empty.copy() for node in session.get_inputs() if node.name.startswith("past")}
    feed = {
        "input_ids": np.array([TOKENS]),
        "attention_mask": np.ones((1, len(TOKENS)), np.int64),
        "logit_rows": np.array([[len(TOKENS) - 1]]),
    }
    return np.asarray(session.run(["logits"], {**feed, **past})[0])[0, 0]


def test_the_kernels_are_asked() -> None:
    features = set(machine.cpu_features())
    if "avx2" in features:  # elsewhere nothing is known beforehand
        assert int8_range.sums_are_exact() == bool(features & {"avx_vnni", "avx512_vnni"})


def test_a_saturating_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            rows, depth = feed["A"].shape
            return [np.full((rows, 48), depth // 2 * 32767, np.int32)]

    monkeypatch.setattr(ort, "InferenceSession", Saturating)
    assert int8_range.sums_are_exact.__wrapped__() is False


def test_seven_bits_where_sums_saturate(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_range, "sums_are_exact", lambda: False)
    assert np.array_equal(logits(bundle), as_in_the_file(bundle))


@pytest.mark.skipif(not int8_range.sums_are_exact(), reason="kernels saturate on this CPU")
def test_eight_bits_are_closer(bundle: Path, demo_bundles: dict[str, Path]) -> None:
    wanted = logits(demo_bundles["fp32"])
    found, before = logits(bundle), as_in_the_file(bundle)
    assert np.abs(found - wanted).mean() < 0.75 * np.abs(before - wanted).mean()
    split = load(bundle, threads=1, invariant=True).runner
    split.prefill(TOKENS[:11])
    assert np.array_equal(split.prefill(TOKENS[11:]), logits(bundle, invariant=True))
