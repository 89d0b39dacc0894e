"""Residual and norm in one node: the same logits as apart, and its counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from glm4export.build import build as build_module
from glm4export.build.options import BuildOptions
from glm4export.passes.counted import Pass
from glm4export.passes.fuse_residual_norms import fuse_residual_norms
from glm4export.passes.pipeline import pipeline
from glm4runtime import load
from glm4runtime.contract import GraphName
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.parity import check_parity

FUSED = "SkipSimplifiedLayerNormalization"
LAYERS = 3


def nodes(bundle: Path, graph: str) -> list[onnx.NodeProto]:
    return list(onnx.load(bundle / f"{graph}.onnx", load_external_data=False).graph.node)


def test_fp32_with_fused_norms_is_transformers(build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """No build for a CPU has them, but its kernel of the node computes what CUDA's does."""

    def with_fused(options: BuildOptions, graph: GraphName, scales: None) -> Iterator[Pass]:
        yield from pipeline(options, graph, scales)
        yield fuse_residual_norms()

    monkeypatch.setattr(build_module, "pipeline", with_fused)
    model = checkpoints.random_model(num_hidden_layers=LAYERS)
    bundle = build_bundle(model, precision="fp32", target="cpu")
    for graph in ("prefill", "decode"):
        fused = [node for node in nodes(bundle, graph) if node.op_type == FUSED]
        assert [len(node.input) for node in fused] == [3] * (2 * LAYERS - 1)
        assert all(list(node.output[1:3]) == ["", ""] and node.output[3] for node in fused)
    check_parity(load(bundle, threads=1), model, list(range(5, 22)))


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_bundles_for_cuda(precision: str, build_bundle: Build) -> None:
    """Of each residual sum one node, the final norm apart, no int8 activations; near the graphs for cpu."""
    model = checkpoints.random_model(num_hidden_layers=2)
    cuda, cpu = (build_bundle(model, precision=precision, target=target) for target in ("cuda", "cpu"))
    found = nodes(cuda, "prefill")
    assert [node.op_type for node in found].count(FUSED) == 3
    assert [node.op_type for node in found].count("RMSNormalization") == 4 * 2 + 1 - 3
    assert not any(attribute.name == "accuracy_level" for node in found for attribute in node.attribute)
    prompt = list(range(5, 22))
    with load(cuda, provider="cpu", threads=1) as ours, load(cpu, threads=1) as theirs:
        assert len(ours.runner.graphs) == 1  # type: ignore[attr-defined]
        wanted = theirs.runner.prefill(prompt)
        limit = 2e-3 if precision == "fp16" else 0.05  # int8 activations there
        assert np.abs(ours.runner.prefill(prompt) - wanted).max() < limit * np.abs(wanted).max()
