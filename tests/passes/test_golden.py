"""The graphs of the embedded model, as reviewed: graphs/golden, rewritten by ``python tools/golden.py``."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import onnxsim
import pytest

from glm4export.build.build import compile_graph
from glm4export.build.options import BuildOptions
from glm4export.graph.skeleton import Skeleton
from glm4export.sources.checkpoint import CONFIG, locate
from glm4export.sources.config_json import read_config
from tools.golden import GOLDEN, golden_skeletons, listing


@pytest.fixture(scope="module")
def skeletons() -> dict[str, Skeleton]:
    return golden_skeletons()


def test_listings_are_the_reviewed_ones(skeletons: dict[str, Skeleton]) -> None:
    stored = {str(path.relative_to(GOLDEN)): path.read_text(encoding="utf-8") for path in GOLDEN.rglob("*.txt")}
    current = {name: listing(skeleton) for name, skeleton in skeletons.items()}
    assert current.keys() == stored.keys()
    changed = [name for name in current if current[name] != stored[name]]
    assert not changed, f"{changed} changed; if that is meant, run `python tools/golden.py` and review the diff"


def what_onnxsim_changes(skeleton: Skeleton) -> tuple[Counter[str], Counter[str]]:
    """Operators that onnxsim takes out, and those it puts in; weights are inputs, so that none can be folded."""
    model = skeleton.model.clone()
    for name in skeleton.recipes:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    for name in [name for name, value in model.graph.initializers.items() if value.is_graph_input()]:
        del model.graph.initializers[name]  # an input's default, which onnxsim takes for a constant
    graph = ir.to_proto(model)
    simplified, _ = onnxsim.simplify(graph, check_n=0)
    before, after = operators(graph), operators(simplified)
    return before - after, after - before


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}" for node in model.graph.node)


def test_onnxsim_finds_nothing_left_to_simplify(skeletons: dict[str, Skeleton]) -> None:
    found = {name: what_onnxsim_changes(skeleton) for name, skeleton in skeletons.items()}
    assert found == dict.fromkeys(skeletons, (Counter(), Counter()))


def test_onnxsim_simplifies_graphs_that_were_not() -> None:
    config = read_config(locate(None).folder / CONFIG)
    options = BuildOptions("fp32", "cpu", simplify=False)
    removed, _ = what_onnxsim_changes(compile_graph(config, "prefill", options, max_seq_len=512, scales=None))
    assert removed["::Constant"] and removed["::Concat"]
