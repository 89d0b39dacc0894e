"""Every pass does what the config says it must, counted; and the skeleton never holds weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from glm4export import passes
from glm4export.build.build import compile_graph
from glm4export.build.options import BuildOptions
from glm4export.graph.skeleton import Skeleton
from glm4export.sources.config import read_config
from glm4export.terminal.errors import InternalError
from glm4export.weights.fp16 import Fp16Scales
from glm4export.weights.recipes import Concat, Scale, Source, Transpose
from glm4export.weights.storage import Formats
from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError
from tests.helpers import checkpoints
from tests.helpers.traces import kept_trace

LAYERS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Glm4Config:
    model = checkpoints.random_model(num_hidden_layers=LAYERS)
    return read_config(checkpoints.save(model, tmp_path_factory.mktemp("passes")) / "config.json")


def skeleton_of(config: Glm4Config, graph: str, dtype: torch.dtype = torch.float16) -> Skeleton:
    return Skeleton(kept_trace(config, graph, dtype=dtype, max_seq_len=32), config, 32, Fp16Scales(2.0**-7, 2.0**-2))


def operators(skeleton: Skeleton) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in skeleton.graph)


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_operators_follow_the_config(graph: str, config: Glm4Config) -> None:
    skeleton = skeleton_of(config, graph)
    counts = passes.run(passes.ORT_FP16, skeleton)
    assert counts["lift_weights"] == {"weights": 44, "transposes": 19}
    assert counts["simplify"]["removed"] > 0
    found = operators(skeleton)
    assert found["MatMul"] == 4 * LAYERS + 1
    assert found["RMSNormalization"] == 4 * LAYERS + 1
    assert found["com.microsoft::GroupQueryAttention"] == LAYERS
    assert found["Split"] == LAYERS
    assert not {"Transpose", "SplitToSequence", "SequenceAt", "Constant", "glm4::Attention"} & found.keys()


FORMATS = Formats(linear_bits=8, head_bits=8, embedding_bits=16, block=32, symmetric=True)
INT8_CACHE = (*passes.ORT_FP32[:3], passes.INT8_CACHE["cpu", "decode"])
WIDE_CACHE = (*passes.ORT_FP32[:3], passes.INT8_CACHE["cpu", "prefill"])


@pytest.mark.parametrize(
    ("pipeline", "graph", "operator", "message"),
    [
        (passes.ORT_FP32[:1], "decode", "Transpose", "lift_weights .* transposes 18, expected 19"),
        (passes.ORT_FP16[:2], "decode", "RMSNormalization", "rescale_fp16 .* eps 12, expected 13"),
        (passes.ORT_FP32[:2], "decode", "glm4::Attention", "fuse_qkv .* fused 2, expected 3"),
        (passes.ORT_FP32[:3], "decode", "glm4::Attention", "lower_attention_gqa .* attention 2, expected 3"),
        (passes.ORT_FP32, "prefill", "SplitToSequence", "simplify on the prefill graph .* splits 2, expected 3"),
        (passes.ORT_INT_FP32[:3], "decode", "MatMul", "quantize_linears .* linears 12, expected 13"),
        (passes.ORT_INT_FP32[:3], "decode", "Add", "quantize_linears .* biases 2, expected 3"),
        (passes.PREFILL_INT8[:3], "prefill", "MatMul", "quantize_rows .* linears 11, expected 12"),
        (INT8_CACHE, "decode", "com.microsoft::GroupQueryAttention", "quantize_cache .* caches 4, expected 6"),
        (WIDE_CACHE, "prefill", "com.microsoft::GroupQueryAttention", "widen_cache .* caches 4, expected 6"),
        (passes.TRT_FP8[:4], "step", "MatMul", "quantize_fp8 .* linears 11, expected 12; activations 11, expected 12"),
        (passes.TRT_INT[:4], "step", "MatMul", "dequantize_linears .* linears 12, expected 13"),
        (passes.TRT_FP32[:3], "step", "glm4::Attention", "step graph: its mask is read by Unheard, where only"),
        (passes.TRT_PLUGIN_BF16, "step", "glm4::Attention", "step graph: its mask is read by Unheard, where only"),
    ],
)
def test_a_pass_that_misses_a_node_is_an_error(
    pipeline: tuple[passes.Pass, ...], graph: str, operator: str, message: str, config: Glm4Config
) -> None:
    """One node of the last layer goes by another name, as after an exporter's update."""
    skeleton = skeleton_of(config, graph)
    skeleton.formats = FORMATS
    passes.run(pipeline[:-1], skeleton)
    domain, _, op_type = operator.rpartition("::")
    layer = f"model.layers.{LAYERS - 1}."
    node = next(node for node in skeleton.nodes(op_type, domain) if any(layer in name for name in names_around(node)))
    node.op_type = "Unheard"
    with pytest.raises(InternalError, match=f"^{message}(.|\n)*please report it with this message$"):
        passes.run(pipeline[-1:], skeleton)


def names_around(node: ir.Node) -> list[str]:
    """The node's own name and its inputs'."""
    return [node.name or "", *(value.name or "" for value in node.inputs if value is not None)]


def test_layers_out_of_order_are_no_int8_cache(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    passes.run(INT8_CACHE[:-1], skeleton)
    skeleton.nodes("GroupQueryAttention", "com.microsoft")[0].op_type = "Unheard"
    with pytest.raises(InternalError, match=r"layers\.1\..*: its cache isn't past_key_values\.0\.key, as of layer 0"):
        passes.run(INT8_CACHE[-1:], skeleton)


@pytest.mark.parametrize("operator", ["glm4::Attention", "com.microsoft::GroupQueryAttention"])
def test_a_pass_that_finds_nothing_at_all_is_an_error(operator: str, config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "prefill")
    pipeline = passes.ORT_FP32[:3] if operator.startswith("glm4") else WIDE_CACHE
    passes.run(pipeline[:-1], skeleton)
    domain, _, op_type = operator.rpartition("::")
    for node in skeleton.nodes(op_type, domain):
        node.op_type = "Unheard"
    with pytest.raises(InternalError, match=r"(attention|caches) 0, expected [36]: the traced graph is not what this"):
        passes.run(pipeline[-1:], skeleton)


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
        passes.run(passes.ORT_FP16, skeleton)


def test_traced_attention_is_one_node_a_layer_with_the_checkpoints_names(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    assert operators(skeleton)["glm4::Attention"] == LAYERS
    assert {node.name for node in skeleton.nodes("Attention", "glm4")} == {
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


def test_recipes_say_how_each_stored_tensor_is_made(config: Glm4Config) -> None:
    skeleton = skeleton_of(config, "decode")
    passes.run(passes.ORT_FP16, skeleton)
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
    passes.run(passes.ORT_FP16, skeleton)
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
    for skeleton in (prefill, decode):
        passes.run(passes.ORT_FP16, skeleton)
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
        passes.run(passes.ORT_FP16, skeleton)
