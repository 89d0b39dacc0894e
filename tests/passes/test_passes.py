"""Every pass does what the config says it must, counted; and the skeleton never holds weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from glm4export.build import build
from glm4export.build.build import compile_graph
from glm4export.build.options import BuildOptions
from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, Pass
from glm4export.passes.pipeline import pipeline
from glm4export.sources.config_json import read_config
from glm4export.terminal.errors import InternalError
from glm4export.weights.fp16 import Fp16Scales
from glm4export.weights.recipes import Concat, Scale, Source, Transpose
from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError
from tests.helpers import checkpoints

LAYERS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Glm4Config:
    model = checkpoints.random_model(num_hidden_layers=LAYERS)
    return read_config(checkpoints.save(model, tmp_path_factory.mktemp("passes")) / "config.json")


SCALES = Fp16Scales(2.0**-7, 2.0**-2)
ATTENTION, GQA = "glm4::Attention", "com.microsoft::GroupQueryAttention"
FP16, INT8 = BuildOptions("fp16"), BuildOptions("int8")
INT8_CACHE = BuildOptions("fp32", kv_cache="int8", calibrate=Path("unread"))
FP8 = BuildOptions("fp8", "tensorrt", calibrate=Path("unread"))


def skeleton_of(config: Glm4Config, graph: str) -> Skeleton:
    """Traced in fp16 whatever the options: what passes count is the same, and one trace serves all tests."""
    return Skeleton(build.trace(config, graph, dtype=torch.float16, max_seq_len=32), config, 32)


def passes_of(options: BuildOptions, graph: str) -> list[Pass]:
    return list(pipeline(options, graph, SCALES if options.compute_dtype == torch.float16 else None))


def run(skeleton: Skeleton, options: BuildOptions, graph: str) -> dict[str, Counts]:
    return {step.name: step(skeleton) for step in passes_of(options, graph)}


def run_until(name: str, skeleton: Skeleton, options: BuildOptions, graph: str) -> Pass:
    """Run the passes in front of one; returns that one."""
    for step in passes_of(options, graph):
        if step.name == name:
            return step
        step(skeleton)
    raise AssertionError(f"{options} runs no {name}")


def operators(skeleton: Skeleton) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in skeleton.graph)


def named(operator: str, skeleton: Skeleton) -> list[ir.Node]:
    domain, _, op_type = operator.rpartition("::")
    return skeleton.nodes(op_type, domain)


@pytest.mark.parametrize(
    ("options", "graph", "names"),
    [
        (BuildOptions("fp32"), "decode", "lift_weights fuse_qkv lower_attention_gqa simplify"),
        (BuildOptions("fp16", simplify=False), "decode", "lift_weights rescale_fp16 fuse_qkv lower_attention_gqa"),
        (
            BuildOptions("int4", prefill_precision="int8", kv_cache="int8", calibrate=Path("unread")),
            "prefill",
            "lift_weights fuse_qkv quantize_rows quantize_linears quantize_embedding lower_attention_gqa widen_cache "
            "simplify",
        ),
        (
            BuildOptions("int4", "cuda", kv_cache="int8", calibrate=Path("unread")),
            "prefill",
            "lift_weights rescale_fp16 fuse_qkv quantize_linears quantize_embedding lower_attention_gqa quantize_cache "
            "simplify fuse_residual_norms",
        ),
        (
            FP8,
            "step",
            "lift_weights rescale_fp16 fuse_qkv quantize_fp8 dequantize_linears lower_attention_standard simplify",
        ),
        (
            BuildOptions("int8", "tensorrt", attention="plugin"),
            "step",
            "lift_weights rescale_fp16 fuse_qkv dequantize_linears simplify lower_attention_plugin",
        ),
    ],
    ids=str,
)
def test_the_options_decide_which_passes_run(options: BuildOptions, graph: str, names: str) -> None:
    assert [step.name for step in passes_of(options, graph)] == names.split()


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_operators_follow_the_config(graph: str, config: Glm4Config) -> None:
    skeleton = skeleton_of(config, graph)
    counts = run(skeleton, FP16, graph)
    assert counts["lift_weights"] == {"weights": 44, "transposes": 19}
    assert counts["simplify"]["removed"] > 0
    found = operators(skeleton)
    assert found["MatMul"] == 4 * LAYERS + 1
    assert found["RMSNormalization"] == 4 * LAYERS + 1
    assert found[GQA] == LAYERS
    assert found["Split"] == LAYERS
    assert not {"Transpose", "SplitToSequence", "SequenceAt", "Constant", ATTENTION} & found.keys()


@pytest.mark.parametrize(
    ("options", "graph", "operator", "name", "message"),
    [
        (FP16, "decode", "Transpose", "lift_weights", "transposes 18, expected 19"),
        (FP16, "decode", "RMSNormalization", "rescale_fp16", "eps 12, expected 13"),
        (FP16, "decode", ATTENTION, "fuse_qkv", "fused 2, expected 3"),
        (FP16, "decode", ATTENTION, "lower_attention_gqa", "attention 2, expected 3"),
        (FP16, "prefill", "SplitToSequence", "simplify", "splits 2, expected 3"),
        (INT8, "decode", "MatMul", "quantize_linears", "linears 12, expected 13"),
        (INT8, "decode", "Add", "quantize_linears", "biases 2, expected 3"),
        (
            BuildOptions("int8", prefill_precision="int8"),
            "prefill",
            "MatMul",
            "quantize_rows",
            "linears 11, expected 12",
        ),
        (INT8_CACHE, "decode", GQA, "quantize_cache", "caches 4, expected 6"),
        (INT8_CACHE, "prefill", GQA, "widen_cache", "caches 4, expected 6"),
        (FP8, "step", "MatMul", "quantize_fp8", "linears 11, expected 12; activations 11, expected 12"),
        (BuildOptions("int4", "tensorrt"), "step", "MatMul", "dequantize_linears", "linears 12, expected 13"),
    ],
)
def test_a_pass_that_misses_a_node_is_an_error(
    options: BuildOptions, graph: str, operator: str, name: str, message: str, config: Glm4Config
) -> None:
    """One node of the last layer goes by another name, as after an exporter's update."""
    skeleton = skeleton_of(config, graph)
    step = run_until(name, skeleton, options, graph)
    rename_one(operator, skeleton)
    with pytest.raises(
        InternalError, match=rf"^{name} on the {graph} graph .*{message}(.|\n)*please report it with this message$"
    ):
        step(skeleton)


@pytest.mark.parametrize("attention", ["standard", "plugin"])
def test_a_mask_that_others_read_is_an_error(attention: str, config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "step")
    options = BuildOptions("bf16", "tensorrt", attention=attention)
    step = run_until(f"lower_attention_{attention}", skeleton, options, "step")
    rename_one(ATTENTION, skeleton)
    with pytest.raises(InternalError, match=r"^step graph: its mask is read by Unheard, where only glm4::Attention is"):
        step(skeleton)


def rename_one(operator: str, skeleton: Skeleton) -> None:
    """The last layer's first node of that operator."""
    layer = f"model.layers.{LAYERS - 1}."
    node = next(node for node in named(operator, skeleton) if any(layer in name for name in names_around(node)))
    node.op_type = "Unheard"


def names_around(node: ir.Node) -> list[str]:
    """The node's own name and its inputs'."""
    return [node.name or "", *(value.name or "" for value in node.inputs if value is not None)]


def test_layers_out_of_order_are_no_int8_cache(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    step = run_until("quantize_cache", skeleton, INT8_CACHE, "decode")
    named(GQA, skeleton)[0].op_type = "Unheard"
    with pytest.raises(InternalError, match=r"layers\.1\..*: its cache isn't past_key_values\.0\.key, as of layer 0"):
        step(skeleton)


@pytest.mark.parametrize(("operator", "name"), [(ATTENTION, "lower_attention_gqa"), (GQA, "widen_cache")])
def test_a_pass_that_finds_nothing_at_all_is_an_error(operator: str, name: str, config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "prefill")
    step = run_until(name, skeleton, INT8_CACHE, "prefill")
    for node in named(operator, skeleton):
        node.op_type = "Unheard"
    with pytest.raises(InternalError, match=r"(attention|caches) 0, expected [36]: the traced graph is not what this"):
        step(skeleton)


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        (BuildOptions("fp16", "cpu"), "decode"),
        (BuildOptions("int8", "cpu", head_bits=16, embedding_bits=4), "decode"),
        (BuildOptions("int4", "cpu", head_bits=16, prefill_precision="int8"), "prefill"),
        (BuildOptions("int4", "cuda", head_bits=4), "decode"),
        (BuildOptions("int4", "tensorrt", head_bits=16), "step"),
        (BuildOptions("fp8", "tensorrt", head_bits=16, calibrate=Path("unread")), "step"),
    ],
    ids=str,
)
def test_promises_hold_without_biases_too(options: BuildOptions, graph: str, config: Glm4Config) -> None:
    plain = dataclasses.replace(config, attention_bias=False, num_hidden_layers=1)
    compile_graph(plain, graph, options, max_seq_len=32, scales=Fp16Scales(2.0**-7, 1.0))


def test_an_eps_that_rescaling_leaves_nothing_of_is_refused(config: Glm4Config) -> None:
    skeleton = skeleton_of(dataclasses.replace(config, rms_norm_eps=1e-35), "decode")
    with pytest.raises(UserError, match=r"norm\.weight: rms_norm_eps=1e-35 scaled by .*, is nothing in float32; build"):
        run(skeleton, FP16, "decode")


def test_traced_attention_is_one_node_a_layer_with_the_checkpoints_names(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    assert operators(skeleton)[ATTENTION] == LAYERS
    assert {node.name for node in named(ATTENTION, skeleton)} == {
        f"model.layers.{layer}.self_attn/Attention" for layer in range(LAYERS)
    }
    assert [value.name for value in skeleton.graph.inputs][:4] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    shapes = {value.name: str(value.shape) for value in (*skeleton.graph.inputs, *skeleton.graph.outputs)}
    assert shapes["attention_mask"] == "[batch,total_seq]"
    assert shapes["past_key_values.2.value"] == "[batch,2,max_seq,32]"
    assert shapes["logits"] == "[batch,seq,96]"


def test_linears_have_weights_as_checkpoints_do(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    run_until("rescale_fp16", skeleton, FP16, "decode")
    linears = {linear.name.removeprefix("model.layers.2."): linear for linear in skeleton.linears()}
    assert len(list(skeleton.linears())) == 6 * LAYERS + 1
    assert linears["mlp.gate_up_proj.weight"].weight == Source("model.layers.2.mlp.gate_up_proj.weight", (256, 64))
    assert linears["mlp.gate_up_proj.weight"].dtype == "float16"
    assert linears["lm_head.weight"].weight == Source("lm_head.weight", (96, 64))
    query, key, output = (linears[f"self_attn.{part}_proj.weight"] for part in "qko")
    assert query.input is key.input is query.node.inputs[0]
    assert output.input.producer() in named(ATTENTION, skeleton)


def test_a_replaced_nodes_outputs_keep_names_shapes_and_readers(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    old = named(ATTENTION, skeleton)[1]
    names = [value.name for value in skeleton.graph.outputs]
    (reader,) = old.outputs[0].consumers()
    new = skeleton.replace(old, "here", "Stand-in", old.inputs, {"scale": 2.0}, domain="test")
    assert old not in skeleton.graph and new in skeleton.graph and new.name == "here"
    assert [value.name for value in skeleton.graph.outputs] == names
    assert new.outputs[1] is next(value for value in skeleton.graph.outputs if value.name == "present.1.key")
    assert str(new.outputs[1].shape) == "[batch,2,max_seq,32]" and new.outputs[1].dtype == ir.DataType.FLOAT16
    assert reader.inputs[0] is new.outputs[0] and new.outputs[0].name == "model.layers.1.self_attn/Attention"
    assert new.attributes["scale"].as_float() == 2.0


def test_recipes_say_how_each_stored_tensor_is_made(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    run(skeleton, FP16, "decode")
    layer, recipes = "model.layers.1.", skeleton.recipes
    gate_up = Source(f"{layer}mlp.gate_up_proj.weight", (256, 64))
    assert recipes[gate_up.name].expr == Transpose(Scale(gate_up, 2.0**-7, start=128))
    parts = [Source(f"{layer}self_attn.{c}_proj.weight", (128 if c == "q" else 64, 64)) for c in "qkv"]
    assert recipes[f"{layer}self_attn.qkv_proj.weight"].expr == Transpose(Concat(tuple(parts)))
    assert recipes[f"{layer}self_attn.qkv_proj.weight"].shape == (64, 256)
    assert recipes[f"{layer}post_mlp_layernorm.weight"].expr == Scale(
        Source(f"{layer}post_mlp_layernorm.weight", (64,)), 2.0**-2
    )
    assert recipes[f"{layer}input_layernorm.weight"].expr == Source(f"{layer}input_layernorm.weight", (64,))
    assert {recipe.dtype for recipe in recipes.values()} == {"float16"}
    assert recipes.keys() <= skeleton.graph.initializers.keys()
    assert all(skeleton.graph.initializers[name].const_value is None for name in recipes)


def test_eps_is_scaled_by_the_square_of_what_its_norm_reads(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "prefill")
    run(skeleton, FP16, "prefill")
    eps = {
        next(skeleton.weights_of(node)): node.attributes["epsilon"].as_float()
        for node in skeleton.nodes("RMSNormalization")
    }
    assert eps["model.layers.0.post_mlp_layernorm.weight"] == pytest.approx(1e-5 * 2.0**-14)
    assert eps["model.layers.2.post_self_attn_layernorm.weight"] == pytest.approx(1e-5 * 2.0**-14)
    assert eps["model.layers.2.post_attention_layernorm.weight"] == pytest.approx(1e-5 * 2.0**-4)
    assert eps["model.norm.weight"] == pytest.approx(1e-5 * 2.0**-4)


def test_prefill_and_decode_ask_for_the_same_weights(config: Glm4Config) -> None:
    prefill, decode = (skeleton_of(config, graph) for graph in ("prefill", "decode"))
    run(prefill, FP16, "prefill")
    run(decode, FP16, "decode")
    assert prefill.recipes == decode.recipes


@pytest.mark.parametrize(
    ("head_dim", "message"),
    [
        (8, r"head_dim=8 with 4 rotary columns.*multiples of 16"),
        (24, r"head_dim=24: ONNX Runtime's attention takes heads whose size is a multiple of 16"),
    ],
)
def test_heads_that_the_kernel_does_not_take_are_refused(head_dim: int, message: str, tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.random_model(head_dim=head_dim), tmp_path)
    skeleton = skeleton_of(read_config(folder / "config.json"), "decode")
    with pytest.raises(UserError, match=message):
        run(skeleton, FP16, "decode")
