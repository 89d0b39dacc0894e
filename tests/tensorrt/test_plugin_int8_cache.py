"""``--attention plugin --kv-cache int8``: the step graph, its scales, and what TensorRT's plugins get of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from glm4export.build.options import BuildOptions
from glm4export.tensorrt.plugin.graph import use_plugins
from glm4export.verification.verify import kl_divergence
from glm4runtime import UserError, load
from glm4runtime.contract import read_manifest
from tests.conftest import Build
from tests.helpers.heldout import HELDOUT
from tests.helpers.step_graph import StepGraph, ones

INT8_CACHE: dict[str, Any] = {"target": "tensorrt", "attention": "plugin", "kv_cache": "int8"}


def test_prompts_and_steps_beside_a_cache_in_fp16(
    int8_cache_plugin: Path, tensorrt_bundles: Callable[[str], Path]
) -> None:
    """Two prompts of unequal lengths at once, then steps, in the function of standard operators."""
    ids = np.arange(5, 27).reshape(2, 11) % 400
    found, wanted = (StepGraph(path, batch=2) for path in (int8_cache_plugin, tensorrt_bundles("fp16")))
    assert {value.numpy().dtype for value in found.cache.values()} == {np.dtype(np.int8)}
    rounds = [(ids, np.array([11, 6])), *[(ids[:, step : step + 1], ones(1).repeat(2)) for step in range(3)]]
    for tokens, new in rounds:
        ours, theirs = found.run(tokens, new), wanted.run(tokens, new)
        for row in range(2):
            assert kl_divergence(theirs[row, : new[row]], ours[row, : new[row]]).mean() < 2e-3
    assert all(np.abs(value.numpy()).max() > 60 for value in found.cache.values())  # the range is used


def test_steps_are_a_heads_own(int8_cache_plugin: Path, tmp_path: Path) -> None:
    """The largest that a channel of the head needs, so none of its values is cut off more often than by channels."""
    copy = Path(shutil.copytree(int8_cache_plugin, tmp_path / "copy"))  # other tests link to it, which onnx_ir refuses
    model, cache = ir.load(copy / "step.onnx"), read_manifest(copy).cache
    assert cache.dtype == "int8"
    nodes = [node for node in model.graph if node.domain == "glm4"]
    scales = [value for node in nodes for value in node.inputs[8:]]
    assert len(scales) == 2 * cache.layers
    for value in scales:
        assert value is not None and value.const_value is not None
        steps = value.const_value.numpy()
        assert steps.dtype == np.float32 and steps.shape == (cache.kv_heads,) and (steps > 0).all()
    with load(int8_cache_plugin, provider="cpu", threads=1) as session:
        session.runner.prefill(np.arange(48) % 400)
        clipped = session.runner.cache_clipped()
        assert clipped is not None and clipped < 0.005


def test_plugins_read_the_scales(int8_cache_plugin: Path) -> None:
    model = ir.load(int8_cache_plugin / "step.onnx")
    scales = [[value.name for value in node.inputs[8:] if value] for node in model.graph if node.domain == "glm4"]
    use_plugins(model, programs=256)
    plugins = [node for node in model.graph if node.domain == "glm4"]
    assert "attention/unscaled" not in model.graph.initializers
    for layer, expected in enumerate(scales):
        append, attend, combine = plugins[3 * layer : 3 * layer + 3]
        assert expected == [f"model.layers.{layer}.self_attn.{part}_scales" for part in ("key", "value")]
        assert [value.name for value in append.inputs[7:] if value] == expected
        assert [value.name for value in attend.inputs[8:] if value] == expected
        assert len(combine.inputs) == 3
        assert {value.dtype for value in (*append.inputs[1:3], *append.outputs) if value} == {ir.DataType.INT8}


def test_int8_weights_go_with_it(build_bundle: Build, tensorrt_bundles: Callable[[str], Path]) -> None:
    """TensorRT's int8 weights aren't calibrated, so that the text is for the cache alone."""
    bundle = build_bundle(None, precision="int8", max_seq_len=64, calibrate=HELDOUT, **INT8_CACHE)
    ids = np.arange(5, 38)[None]
    found, wanted = (StepGraph(path).run(ids, ones(33))[0] for path in (bundle, tensorrt_bundles("int8")))
    assert kl_divergence(wanted, found).mean() < 2e-3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"attention": "standard"}, "--kv-cache int8 goes with --attention plugin on --target tensorrt"),
        ({"calibrate": None}, "--kv-cache int8 needs --calibrate FILE"),
        ({"precision": "int8", "kv_cache": None}, "--calibrate does not go with --precision int8 on --target tensorrt"),
        ({"precision": "fp32", "kv_cache": None, "calibrate": None}, "--attention plugin goes with"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**{"precision": "fp16", "calibrate": Path("text"), **INT8_CACHE, **options})
