"""The ledger: which tensors a checkpoint must hold, and how a refusal lists those that differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4export.sources.checkpoint import Checkpoint, CheckpointError, locate
from glm4export.sources.config_json import read_config
from glm4export.sources.ledger import expected_tensors
from tests.helpers import checkpoints
from tests.helpers.checkpoints import change


def test_ledger_lists_everything_at_once(mine: Path) -> None:
    change(
        mine,
        model__norm__weight=None,
        model__layers__1__mlp__down_proj__weight=None,
        model__layers__0__self_attn__q_proj__bias=torch.zeros(7),
        lm_head__weight=torch.zeros(64, 96),
        model__layers__2__input_layernorm__weight=torch.zeros(64),
        score__weight=torch.zeros(2, 64),
        model__rotary_emb__inv_freq=torch.zeros(8),  # some releases stored it: not an error
    )
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    assert str(caught.value).splitlines() == [
        f"{mine}: 6 tensors do not match config.json; is it this model's config?",
        "  missing model.layers.1.mlp.down_proj.weight [64, 128]",
        "  missing model.norm.weight [64]",
        "  unexpected model.layers.2.input_layernorm.weight [64]",
        "  unexpected score.weight [2, 64]",
        "  mis-shaped lm_head.weight: [64, 96], expected [96, 64]",
        "  mis-shaped model.layers.0.self_attn.q_proj.bias: [7], expected [128]",
        "  num_hidden_layers=2, and tensors of 3 layers are here",
    ]


def test_a_long_ledger_is_cut_and_counted(mine: Path) -> None:
    extra = {f"model__layers__0__self_attn__experts{index}": torch.zeros(1) for index in range(3000)}
    change(mine, **extra, model__norm__weight=torch.zeros(3))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{mine}: 3001 tensors do not match config.json; is it this model's config?"
    assert lines[1] == "  unexpected model.layers.0.self_attn.experts0 [1]"
    assert lines[11:] == ["  … and 2990 more", "  mis-shaped model.norm.weight: [3], expected [64]"]


@pytest.mark.parametrize("layers", [10**6, 2**31 - 1])
def test_layers_that_nothing_could_hold_are_refused_by_arithmetic(layers: int, single: Path) -> None:
    """13 tensors for every layer that isn't there, counted and not made."""
    config = dataclasses.replace(read_config(single / "config.json"), num_hidden_layers=layers)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single).check(config)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{single}: {13 * (layers - 2)} tensors do not match")
    assert lines[1] == "  missing model.layers.2.input_layernorm.weight [64]"
    assert lines[-2:] == [
        f"  … and {13 * (layers - 2) - 20} more",
        f"  num_hidden_layers={layers}, and tensors of 2 layers are here",
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes_are_those_of_transformers(bias: bool, tmp_path: Path) -> None:
    model = checkpoints.random_model(attention_bias=bias, num_hidden_layers=3, num_attention_heads=6, head_dim=16)
    config = read_config(checkpoints.save(model, tmp_path) / "config.json")
    assert dict(expected_tensors(config)) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("_orig_mod.", "it was saved from a torch.compile'd model: save model._orig_mod, or strip it from the names"),
        ("module.", "it was saved from inside DataParallel or DistributedDataParallel: save model.module, or strip"),
        ("base_model.model.", "it was saved from inside a PEFT model: save what its merge_and_unload() returns, or"),
        ("glm.\x1b[31m", "save the model inside, or strip it from the names"),
    ],
)
def test_a_prefix_of_every_name_is_named(prefix: str, message: str, mine: Path) -> None:
    file = mine / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    shown = prefix.replace("\x1b", r"\x1b")
    assert str(caught.value).startswith(f"{mine}: every tensor's name begins with `{shown}`; {message}")


def test_a_lora_folder_is_told_from_a_model(mine: Path) -> None:
    (mine / "model.safetensors").rename(mine / "adapter_model.safetensors")
    (mine / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as without_weights:
        Checkpoint.open(mine)
    remedy = f"build the model that it was made for, with `--lora {mine}`"
    assert str(without_weights.value) == f"{mine}: a LoRA adapter (adapter_config.json), without weights; {remedy}"
    (mine / "config.json").unlink()
    with pytest.raises(CheckpointError) as without_config:
        locate(str(mine))
    assert str(without_config.value) == f"{mine}: a LoRA adapter (adapter_config.json), not a model; {remedy}"


def test_unmerged_lora_weights_are_told(mine: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(mine, **{name.replace(".", "__"): torch.zeros(8, 64)})
    with pytest.raises(
        CheckpointError, match=r": '.*lora_A\.weight' is a LoRA adapter's, not merged; save what its merge_and_unload"
    ):
        Checkpoint.open(mine).check(read_config(mine / "config.json"))


def test_names_with_control_codes_are_shown_escaped(mine: Path) -> None:
    change(mine, **{"\x1b[2Jx\n  missing all": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    assert str(caught.value).splitlines()[1:] == [r"  unexpected \x1b[2Jx\n  missing all [1]"]


@pytest.mark.parametrize("store_head", [False, True])
def test_tied_checkpoints_may_store_the_head_or_not(store_head: bool, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.random_model(tie_word_embeddings=True), tmp_path)
    if store_head:
        change(tmp_path, lm_head__weight=torch.zeros(96, 64))
    checkpoint, config = Checkpoint.open(tmp_path), read_config(tmp_path / "config.json")
    assert config.tie_word_embeddings and ("lm_head.weight" in checkpoint.tensors) is store_head
    checkpoint.check(config)


def test_untied_checkpoint_needs_its_head(mine: Path) -> None:
    change(mine, lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"1 tensors do not match(.|\n)*missing lm_head\.weight \[96, 64\]"):
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
