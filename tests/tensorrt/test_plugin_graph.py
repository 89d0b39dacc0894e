"""``--attention plugin``: the node, the function that it stands for, and the plugins that TensorRT gets."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.build.options import BuildOptions
from glm4export.passes.lower_attention_plugin import attention_function
from glm4export.passes.lower_attention_standard import AttentionInputs
from glm4export.sources.checkpoint import locate
from glm4export.sources.config_json import read_config
from glm4export.tensorrt.plugin.geometry import Geometry, split_sizes
from glm4export.tensorrt.plugin.graph import use_plugins, write_plugin_graph
from glm4export.verification.verify import kl_divergence
from glm4runtime.contract import UserError, read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.parity import reference
from tests.helpers.step_graph import StepGraph, ones
from tools.plugin_runs.launch import Integers
from tools.plugin_runs.reference import Case

SCALE = 64**-0.5
LAYERS = checkpoints.SMALL["num_hidden_layers"]


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return checkpoints.random_model()


@pytest.fixture(scope="module")
def bundle(build_bundle: Build, model: Glm4ForCausalLM) -> Path:
    return build_bundle(model, precision="fp16", target="tensorrt", attention="plugin")


def test_a_runtime_without_the_plugin_runs_the_function(bundle: Path, model: Glm4ForCausalLM) -> None:
    """Three right-padded prompts of unequal lengths, a decode step of all, then one prompt in chunks."""
    texts = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((3, 5), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    graph = StepGraph(bundle, batch=3)
    found = [graph.run(ids, lengths, lengths[:, None] - 1), graph.run(np.array([[31], [32], [33]]), np.ones(3, int))]
    for row, text in enumerate(texts):
        wanted = reference(model, [*text, 31 + row])[-2:]
        assert kl_divergence(wanted, np.stack([logits[row, 0] for logits in found])).max() < 1e-4
    prompt = list(range(40, 57))
    graph = StepGraph(bundle)
    chunks = [prompt[start : start + 5] for start in range(0, len(prompt), 5)]
    logits = np.concatenate([graph.run(np.array([chunk]), ones(len(chunk)))[0] for chunk in chunks])
    assert kl_divergence(reference(model, prompt), logits).max() < 1e-4


def test_same_logits_as_the_standard_lowering(bundle: Path, build_bundle: Build, model: Glm4ForCausalLM) -> None:
    standard = build_bundle(model, precision="fp16", target="tensorrt")
    ids = np.arange(5, 22)[None]
    found, wanted = (StepGraph(path).run(ids, ones(17)) for path in (bundle, standard))
    assert np.array_equal(found, wanted)
    assert read_manifest(bundle).graphs == read_manifest(standard).graphs


def test_attention_is_one_node_a_layer_and_one_function(bundle: Path) -> None:
    loaded = onnx.load(bundle / "step.onnx", load_external_data=False)
    nodes = [node for node in loaded.graph.node if node.domain == "glm4"]
    assert [node.op_type for node in nodes] == ["Attention"] * LAYERS
    assert all(len(node.input) == 8 for node in nodes)
    assert {node.domain for node in loaded.graph.node} == {"", "glm4"}
    (function,) = loaded.functions
    assert (function.domain, function.name, list(function.input)) == ("glm4", "Attention", [
        "qkv", "past_key", "past_value", "position_ids", "write_indices", "attention_mask", "cos", "sin",
    ])  # fmt: skip
    assert list(function.output) == ["attended", "present_key", "present_value"]
    assert {node.domain for node in function.node} == {""}
    assert {(entry.domain, entry.version) for entry in loaded.opset_import} == {("", 24), ("glm4", 1)}


def test_a_graph_that_lacks_a_node_for_the_plugin_is_refused(bundle: Path, tmp_path: Path) -> None:
    model = ir.load(bundle / "step.onnx")
    next(node for node in model.graph if node.domain == "glm4").op_type = "Unheard"
    onnx.save(ir.to_proto(model), tmp_path / "step.onnx")
    with pytest.raises(
        UserError, match=rf"step\.onnx: {LAYERS - 1} glm4::Attention nodes for the caches of {LAYERS} la"
    ):
        write_plugin_graph(tmp_path / "step.onnx", tmp_path / "plugins.onnx", programs=2)
    assert not (tmp_path / "plugins.onnx").exists()


def test_tensorrt_gets_three_plugins_a_layer(bundle: Path) -> None:
    loaded = ir.load(bundle / "step.onnx")
    assert use_plugins(loaded, programs=256) == LAYERS
    graph = ir.to_proto(loaded).graph
    plugins = [node for node in graph.node if node.domain == "glm4"]
    assert [node.op_type for node in plugins] == ["AppendToCache", "FlashAttention", "CombineSplits"] * LAYERS
    assert not loaded.functions
    for index in range(LAYERS):
        append, attend, combine = plugins[3 * index : 3 * index + 3]
        assert list(append.output) == [f"present.{index}.key", f"present.{index}.value"]
        assert list(attend.input[1:3]) == list(append.output)  # the order of the kernels
        assert list(combine.input) == list(attend.output)
        assert len(append.input) == 9 and len(attend.input) == 10
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in attend.attribute}
        assert attributes == {
            "plugin_namespace": b"glm4", "plugin_version": b"1", "num_heads": 4, "kv_num_heads": 2, "head_dim": 32,
            "scale": pytest.approx(32**-0.5), "programs": 256,
        }  # fmt: skip
    values = [value.name for value in graph.output]
    assert values[0] == "logits" and "present.1.value" in values


@pytest.mark.parametrize("quantized", [False, True], ids=["cache as activations", "int8 cache"])
@pytest.mark.parametrize("start,seq", [((0, 0, 0), 7), ((9, 0, 4), 3), ((20, 1, 7), 1)])
def test_function_against_pytorch(start: tuple[int, ...], seq: int, quantized: bool) -> None:
    config = read_config(locate(None).folder / "config.json")  # 6 heads on 2, of 64 columns, 32 of them rotated
    cache = "int8" if quantized else "float16"
    case = Case.random(Geometry(6, 2, 64, 32, 32, SCALE, "float16", cache), start, seq)
    session = _session(attention_function(config, quantized=quantized), quantized)
    feeds = case.feeds()
    attended, keys, values = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    wanted, wanted_keys, wanted_values = case.expected()
    assert np.abs(attended.astype(np.float32) - wanted.numpy()).max() < (
        1e-2 if quantized else 4e-3
    )  # rotated in float16 there
    for found, cache in ((keys, wanted_keys), (values, wanted_values)):
        assert np.abs(found.astype(np.float32) - cache.float().numpy()).max() <= (1 if quantized else 4e-3)


def _session(function: ir.Function, quantized: bool) -> ort.InferenceSession:
    """A model of one ``glm4::Attention`` node and its function."""
    half, cache = ir.DataType.FLOAT16, ir.DataType.INT8 if quantized else ir.DataType.FLOAT16
    types = [
        half,
        cache,
        cache,
        ir.DataType.INT64,
        ir.DataType.INT64,
        ir.DataType.BOOL,
        half,
        half,
        *[ir.DataType.FLOAT] * 2,
    ]
    ranks = (3, 4, 4, 2, 1, 4, 2, 2, 1, 1)
    inputs = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([f"{name}{axis}" for axis in range(rank)]))
        for name, kind, rank in zip(AttentionInputs._fields, types, ranks, strict=True)
    ][: len(function.inputs)]
    attributes = {"num_heads": 6, "kv_num_heads": 2, "scale": SCALE}
    attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    outputs = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([f"{name}{axis}" for axis in range(rank)]))
        for name, kind, rank in (("attended", half, 3), ("present_key", cache, 4), ("present_value", cache, 4))
    ]
    node = ir.Node("glm4", "Attention", inputs, attrs, outputs=outputs)
    graph = ir.Graph(inputs, outputs, nodes=[node], name="attention", opset_imports={"": 24, "glm4": 1})
    proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[function]))
    return ort.InferenceSession(proto.SerializeToString())


def test_sizes_of_splits() -> None:
    """Decode is given the programs that were asked for, prefill only what it needs."""
    for batch, seq, wanted in (
        (1, 1, (64, 16)), (2, 1, (64, 16)), (4, 1, (32, 16)), (1, 8, (64, 128)), (64, 1, (2, 16)), (200, 1, (1, 1)),
        (1, 2048, (1, 1)),
    ):  # fmt: skip
        assert split_sizes(batch, seq, 2, 16, 256, Integers()) == wanted
    assert split_sizes(1, 1, 8, 6, 20, Integers()) == (2, 6)


@pytest.mark.parametrize("kv_heads,group", [(2, 16), (2, 24), (8, 6)])  # GLM-4-9B, 32B, Rumination
@pytest.mark.parametrize("programs", [40, 116, 264])  # twice a GPU's multiprocessors: 20, 58, 132
def test_partial_results_have_a_bound(kv_heads: int, group: int, programs: int) -> None:
    """Their size doesn't grow with seq, so the most of a profile lies inside its range; it has a bound all the same."""

    def rows(seq: int, batch: int = 1) -> int:
        splits, kept = split_sizes(batch, seq, kv_heads, group, programs, Integers())
        return batch * kv_heads * splits * kept

    for batch, seq in itertools.product((1, 2, 8, 64), range(1, 513)):
        assert rows(seq, batch) <= max(batch * kv_heads, 64 * programs)
    assert max(map(rows, range(1, 513))) > rows(512) == kv_heads  # a profile's last size isn't its largest
    inside = max(range(2, 17), key=rows)
    assert rows(inside) >= rows(16) and (inside < 16 or kv_heads == 8)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"head_dim": 80, "rotary_dim": 40}, "head_dim=80 is not one of 16, 32, 64, 128"),
        ({"num_heads": 25, "kv_heads": 1}, "25 heads on 1 kv heads are not in groups of 1 to 24"),
        ({"num_heads": 6, "kv_heads": 4}, "6 heads on 4 kv heads"),
        ({"rotary_dim": 66}, "rotary_dim=66 is not an even number up to head_dim=64"),
        ({"dtype": "float32", "cache_dtype": "float32"}, "activations in float32 are not supported"),
        (
            {"cache_dtype": "bfloat16"},
            "a cache in bfloat16 does not go with activations in float16, only float16 or int8",
        ),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(change: dict[str, int | str], message: str) -> None:
    values = {
        "num_heads": 8, "kv_heads": 2, "head_dim": 64, "rotary_dim": 32, "max_seq": 128, "scale": 0.125, **change,
    }  # fmt: skip
    with pytest.raises(UserError, match=f"attention plugin: .*{message}.*; build with --attention standard"):
        Geometry(**values)  # type: ignore[arg-type]


def test_quantized_weights_go_with_it(build_bundle: Build, model: Glm4ForCausalLM) -> None:
    bundles = [
        build_bundle(model, precision="int4", target="tensorrt", block_size=32, attention=attention)
        for attention in ("plugin", "standard")
    ]
    found, wanted = (StepGraph(path).run(np.arange(5, 22)[None], ones(17)) for path in bundles)
    assert np.array_equal(found, wanted)


def test_build_refuses_what_the_plugin_does_not_take(build_bundle: Build) -> None:
    model = checkpoints.random_model(head_dim=24)
    with pytest.raises(UserError, match="head_dim=24 is not one of"):
        build_bundle(model, precision="fp16", target="tensorrt", attention="plugin")
    for target, precision in (("cuda", "fp16"), ("tensorrt", "fp32")):
        with pytest.raises(UserError, match=f"--attention plugin goes with .* not with {target} and {precision}"):
            BuildOptions(precision, target, attention="plugin")


def test_torch_reference_is_the_traced_operator() -> None:
    """The reference of these tests, checked against the definition that the whole project is compared with."""
    case = Case.random(Geometry(4, 2, 32, 16, 32, 32**-0.5), (5, 5), 3)
    arguments = {name: torch.from_numpy(value) for name, value in case.feeds().items()}
    packed = arguments["qkv"].float().split([128, 64, 64], -1)
    attended, keys, values = torch.ops.glm4.attention(
        *packed, case.keys.float(), case.values.float(), torch.ones(2, 8, dtype=torch.int64),
        case.cos.float(), case.sin.float(), 4, 2, 32**-0.5,
    )  # fmt: skip
    wanted, wanted_keys, wanted_values = case.expected()
    for found, expected in ((attended, wanted), (keys, wanted_keys.float()), (values, wanted_values.float())):
        assert (found - expected).abs().max() < 2e-3
