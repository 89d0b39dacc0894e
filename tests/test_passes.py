"""Every pass does what the config says it must, counted; and the skeleton never holds weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from glm4export import passes
from glm4export.config import read_config
from glm4export.recipes import Concat, Scale, Source, Transpose
from glm4export.skeleton import Fp16Scales, Skeleton
from glm4export.trace import trace
from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError

from . import checkpoints

LAYERS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Glm4Config:
    model = checkpoints.random_model(num_hidden_layers=LAYERS)
    return read_config(checkpoints.save(model, tmp_path_factory.mktemp("passes")) / "config.json")


def skeleton_of(config: Glm4Config, graph: str, dtype: torch.dtype = torch.float16) -> Skeleton:
    return Skeleton(trace(config, graph, dtype=dtype, max_seq_len=32), config, 32, Fp16Scales(2.0**-7, 2.0**-2))


def operators(skeleton: Skeleton) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in skeleton.graph)


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_counts_follow_the_config(graph: str, config: Glm4Config) -> None:
    skeleton = skeleton_of(config, graph)
    counts = passes.run(passes.ORT_FP16, skeleton)
    linears = 6 * LAYERS + 1  # q, k, v, o, gate_up, down; and the head
    assert counts["lift_weights"] == {"weights": linears + 3 * LAYERS + 4 * LAYERS + 2 + 2, "transposes": linears}
    assert counts["rescale_fp16"] == {"weights": 4 * LAYERS + 1, "eps": 4 * LAYERS + 1}
    assert counts["fuse_qkv"] == {"fused": LAYERS}
    assert counts["lower_attention_gqa"] == {"attention": LAYERS}
    assert counts["simplify"]["removed"] > 0
    found = operators(skeleton)
    assert found["MatMul"] == 4 * LAYERS + 1
    assert found["RMSNormalization"] == 4 * LAYERS + 1
    assert found["com.microsoft::GroupQueryAttention"] == LAYERS
    assert found["Split"] == LAYERS
    assert not {"Transpose", "SplitToSequence", "SequenceAt", "Constant", "glm4::Attention"} & found.keys()


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
