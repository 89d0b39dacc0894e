"""What is wrong with an adapter is told by name before anything is built."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4export.sources.checkpoint import Checkpoint, CheckpointError, Location
from glm4export.sources.lora import Adapter, merged, open_adapter
from glm4export.sources.lora_config import AdapterError, parse_adapter_config
from tests.helpers import adapters, checkpoints

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.random_model(), tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = checkpoints.random_model()
    return adapters.train(model, tmp_path_factory.mktemp("lora") / "adapter", r=4, target_modules=["q_proj"])


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "mine"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Tensors by their names with ``__`` for a dot; None removes one."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    both = {**load_file(folder / WEIGHTS), **named}
    save_file({name: tensor for name, tensor in both.items() if tensor is not None}, folder / WEIGHTS)


def refusal(base: Path, *folders: Path, scale: float = 1.0) -> str:
    with pytest.raises((AdapterError, CheckpointError)) as caught:
        merged(Checkpoint.open(base), [Adapter.open(Location(folder, {}), scale) for folder in folders], tied=False)
    return str(caught.value)


def test_a_pattern_of_layers_with_an_alternative_that_names_none() -> None:
    config = {**PLAIN, "layers_to_transform": [1], "layers_pattern": [r"model\.(?:layers)|.*q_proj"]}
    assert not parse_adapter_config(config, "a").targets("model.layers.1.self_attn.q_proj")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; supported: LORA"),
        ({"peft_type": None}, "peft_type=None is not supported"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' is not supported; supported: CAUSAL_LM, FEATURE"),
        ({"r": 0}, "r=0 is not a rank; expected 1 to 65536"),
        ({"r": None}, "r=None is not a rank"),
        ({"r": True}, "r=True is not a rank"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0 is not a rank"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj'] is not supported; expected an object"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern holds no regular expression"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0 is not a number above 0"),
        ({"lora_alpha": 10**400}, "is not a number above 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern['q_proj']='8' is not a number above 0"),
        ({"target_modules": None}, "target_modules=None is not supported; expected a list of names, a regular expr"),
        ({"target_modules": "(.|.)*!"}, "target_modules repeats a group, or has more than 4 repeats"),
        ({"rank_pattern": {"(q+)+x": 2}}, "rank_pattern repeats a group"),
        (
            {"exclude_modules": ".*.*.*.*.*!"},
            "exclude_modules repeats a group, or has more than 4 repeats, which may take hours to match",
        ),
        ({"target_modules": "*"}, "target_modules holds no regular expression"),
        ({"target_modules": [1]}, "target_modules=[1] is not supported; expected a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not supported; expected a list of names"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=[-1] is not supported; expected numbers of layers"),
        ({"layers_to_transform": [1], "target_modules": "x"}, "layers_to_transform=[1] is not supported; it goes with"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' is not supported; it goes with layers_to_transform"),
        ({"bias": "some"}, "bias='some' is not supported; supported: none, all, lora_only"),
        ({"use_dora": 1}, "use_dora=1 is not supported; expected true or false"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True is not supported; peft knows none with use_dora"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 is not supported; expected a name"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4' is not supported; it was trained on",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not supported; it may change what"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1] is not supported; it may change what"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported; it may change what the adapter"),
        ({"of_next_year": 0.5}, "of_next_year=0.5 is not supported; it may change what the adapter computes"),
    ],
)
def test_a_config_that_cannot_be_merged(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_adapter_config({**PLAIN, **values}, "adapter_config.json")
    assert str(caught.value).startswith("adapter_config.json: ") and message in str(caught.value)


def test_keys_that_say_nothing_are_no_reason_to_refuse() -> None:
    quiet = {"of_next_year": None, "use_qalora": False, "loftq_config": {}, "exclude_modules": []}
    steering = {"lora_dropout": 0.1, "peft_version": "9", "eva_config": {"rho": 2}, "init_lora_weights": "eva"}
    config = parse_adapter_config({**PLAIN, **quiet, **steering}, "adapter_config.json")
    assert config.targets("model.layers.0.self_attn.q_proj") and config.scaling("model.layers.0.self_attn.q_proj") == 2


def test_files_that_are_not_there(base: Path, mine: Path) -> None:
    (mine / WEIGHTS).rename(mine / "adapter_model.bin")
    assert refusal(base, mine) == (
        f"{mine}: no adapter_model.safetensors; adapter_model.bin is a pickle, which is never read; load the adapter "
        "with peft where you trust it, and save it again with save_pretrained(), which writes safetensors"
    )
    (mine / CONFIG).write_text("{")
    assert refusal(base, mine).startswith(f"{mine / CONFIG}: cannot be read as JSON (")
    (mine / CONFIG).write_text("[]")
    assert refusal(base, mine) == f"{mine / CONFIG}: expected a JSON object, found list"
    (mine / CONFIG).unlink()
    assert refusal(base, mine).startswith(
        f"{mine / CONFIG}: no such file; an adapter saved by peft's save_pretrained()"
    )


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_file(size: int, base: Path, mine: Path) -> None:
    file = mine / WEIGHTS
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    assert refusal(base, mine).startswith(f"{file}: damaged or truncated (")


def test_all_tensors_that_differ_are_told_at_once(base: Path, mine: Path) -> None:
    edit(mine, base_model_name_or_path="org/other")
    change(
        mine,
        **{
            f"{Q}.lora_A.weight": None,
            f"{Q}.lora_B.weight": torch.zeros(3, 4),
            "base_model.model.model.layers.7.mlp.gate_proj.lora_A.weight": torch.zeros(4, 64),
            f"{Q}.lora_A.default.weight": torch.zeros(4, 64),
            "\x1b[2J": torch.zeros(1),
        },
    )
    assert refusal(base, mine).splitlines() == [
        f"{mine}: 5 tensors do not match this model and adapter_config.json, which names 'org/other' as its model",
        f"  missing {Q}.lora_A.weight [4, 64]",
        r"  unexpected \x1b[2J [1]",
        f"  unexpected {Q}.lora_A.default.weight [4, 64]",
        "  unexpected base_model.model.model.layers.7.mlp.gate_proj.lora_A.weight [4, 64]",
        f"  mis-shaped {Q}.lora_B.weight: [3, 4], expected [128, 4]",
        "  an adapter's name is in the names: save it with peft's save_pretrained(), which leaves it out",
        "  GLM-4's gate and up are one linear, gate_up_proj: this adapter is another model's",
    ]


def test_an_adapter_for_another_geometry(base: Path, tmp_path: Path) -> None:
    model = checkpoints.random_model(num_hidden_layers=3, hidden_size=32)
    other = adapters.train(model, tmp_path / "other", r=4, target_modules=["q_proj"])
    lines = refusal(base, other).splitlines()
    assert lines[0] == f"{other}: 4 tensors do not match this model and adapter_config.json"
    third = "base_model.model.model.layers.2.self_attn.q_proj"
    assert f"  unexpected {third}.lora_A.weight [4, 32]" in lines
    assert f"  mis-shaped {Q}.lora_A.weight: [4, 32], expected [4, 64]" in lines


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(value: float, base: Path, mine: Path) -> None:
    tensor = load_file(mine / WEIGHTS)[f"{Q}.lora_B.weight"]
    tensor[5, 1] = value
    change(mine, **{f"{Q}.lora_B.weight": tensor})
    assert refusal(base, mine) == f"{mine / WEIGHTS}: {Q}.lora_B.weight holds a value that is not finite"


def test_a_sum_that_leaves_the_range_of_the_checkpoint(tmp_path: Path, mine: Path) -> None:
    folder = checkpoints.save(checkpoints.random_model().half(), tmp_path / "base")
    ours = merged(Checkpoint.open(folder), [Adapter.open(Location(mine, {}), 1e6)], tied=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(
        AdapterError, match=rf"^{name}: with {mine} merged a number leaves the range of .*torch\.float16"
    ):
        ours.read(name, ((0, 128), (0, 64)))


def test_modules_that_take_no_adapter(base: Path, mine: Path) -> None:
    edit(mine, target_modules=["norm"])
    assert refusal(base, mine) == f"{mine}: target_modules match model.norm, a norm, which has no LoRA"
    edit(mine, target_modules=["gate_proj"])
    assert refusal(base, mine) == f"{mine}: target_modules and modules_to_save match no module of this model"
    edit(mine, target_modules=["o_proj"], lora_bias=True)
    assert ": lora_bias=True, and model.layers.0.self_attn.o_proj has no bias that its" in refusal(base, mine)


def test_adapters_that_do_not_add_up(base: Path, mine: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(mine, tmp_path / "again"))
    edit(again, lora_alpha=3)
    assert refusal(base, mine, again) == (
        f"{mine} and {again}: the same adapter twice; give it once, with the sum of the scales"
    )
    model = checkpoints.random_model()
    dora = adapters.train(model, tmp_path / "dora", 1, r=2, target_modules=["q_proj"], use_dora=True)
    whole = adapters.train(model, tmp_path / "whole", 2, r=2, target_modules=["k_proj"], modules_to_save=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    for pair in ((mine, dora), (dora, mine)):
        assert f"both change {name}, one of them by DoRA, whose norm leaves no room" in refusal(base, *pair)
    for pair in ((mine, whole), (whole, mine)):
        assert refusal(base, *pair).endswith(f"one replaces {name}, which the other changes; merge one of them")
    assert refusal(base, whole, scale=0.5).startswith(f"{whole}: a scale of 0.5 has no meaning for model.layers.")


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "0", "1e-9", "1e300"])
def test_scales_that_merge_nothing(scale: str, mine: Path) -> None:
    with pytest.raises(AdapterError, match=r"^--lora .*: the scale must be 1e-06 to 1000000, or that below zero$"):
        open_adapter(f"{mine}:{scale}")


def test_what_the_option_names(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_adapter(str(mine)).scale == 1 and open_adapter(f"{mine}:-0.25").scale == -0.25
    colon = Path(shutil.copytree(mine, tmp_path / "name:2"))
    assert open_adapter(str(colon)).scale == 1 and open_adapter(f"{colon}:3").scale == 3
    assert open_adapter(f"{mine}/../mine:2").scale == 2
    with pytest.raises(AdapterError, match=r"no such folder, and 'half' is not a scale; give DIR or DIR:SCALE"):
        open_adapter(f"{mine}:half")
    for name in ("../nowhere", "nowhere", "", "a\0b", "x" * 5000, "~nobody-of-that-name/x"):
        with pytest.raises(
            (AdapterError, CheckpointError), match=r"^[^\n]*no such f|^[^\n]*(null|too long|home)[^\n]*$"
        ):
            open_adapter(name)

    def download(repo_id: str, **options: Any) -> str:
        assert repo_id == "org/name" and options["allow_patterns"] == [CONFIG, WEIGHTS]
        return str(mine)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_adapter("org/name:0.5")
    assert opened.source == {"repo_id": "org/name", "commit": "mine"} and opened.scale == 0.5


def test_a_model_by_another_name_is_told(mine: Path) -> None:
    edit(mine, base_model_name_or_path="THUDM/GLM-4-9B-0414")
    adapter = open_adapter(str(mine))
    assert adapter.other_base(Location(mine, {"repo_id": "zai-org/GLM-4-9B-0414"})) is None
    assert adapter.other_base(Location(mine, {"repo_id": "zai-org/GLM-Z1-9B-0414"})) == (
        f"{mine}: the adapter names 'THUDM/GLM-4-9B-0414' as its model, and is merged into zai-org/GLM-Z1-9B-0414"
    )
