"""``glm4export build``: what it refuses, in one line and before any work, and what it tells."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4export import cli
from glm4runtime.contract import MANIFEST
from tests.commands.conftest import Fails
from tests.helpers.edits import edit
from tests.helpers.sidefiles import PANIC, POINTER


def test_build_without_a_checkpoint(fails: Fails, tmp_path: Path) -> None:
    message = fails("build", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert message == f"{tmp_path}/nowhere: no such folder, and not a hub id such as zai-org/GLM-4-9B-0414"
    (tmp_path / "empty").mkdir()
    message = fails("build", tmp_path / "empty", "-o", tmp_path / "out")
    assert message.startswith(f"{tmp_path}/empty/config.json: no such file; a checkpoint folder in Hugging Face layout")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures=\['LlamaForCausalLM'\] is not supported; supported:"),
        ({"hidden_act": "xielu"}, r"hidden_act='xielu' is not supported; supported: gelu, .*silu"),
        ({"rope_parameters": None}, r"partial_rotary_factor is given neither at the top level nor in rope_parameters"),
        ({"vocab_size": "x"}, r"vocab_size='x' must be a int"),
        ({"eos_token_id": [], "pad_token_id": 420}, r"pad_token_id=420 is not a token id below vocab_size=420"),
    ],
)  # fmt: skip
def test_build_of_a_config_that_is_refused(
    changes: dict[str, Any], message: str, fails: Fails, mine: Path, tmp_path: Path
) -> None:
    edit(mine / "config.json", **changes)
    (mine / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    assert re.search(message, fails("build", mine, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_build_of_damaged_weights(fails: Fails, mine: Path, tmp_path: Path) -> None:
    file = mine / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "extra": torch.zeros(1), "model.norm.weight": torch.zeros(3)}, file)
    message = fails("build", mine, "-o", tmp_path / "out", lines=3).splitlines()
    assert message[0] == f"{mine}: 2 tensors do not match config.json; is it this model's config?"
    assert message[1:] == ["  unexpected extra [1]", "  mis-shaped model.norm.weight: [3], expected [64]"]
    os.truncate(file, 1000)
    assert "model.safetensors: damaged or truncated" in fails("build", mine, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_names_and_values_with_escape_codes_are_shown_without(fails: Fails, mine: Path, tmp_path: Path) -> None:
    file = mine / "model.safetensors"
    save_file({**load_file(file), "\x1b]0;owned\x07": torch.zeros(1)}, file)
    message = fails("build", mine, "-o", tmp_path / "out", lines=2)
    assert message.splitlines()[1] == r"  unexpected \x1b]0;owned\x07 [1]"
    edit(mine / "config.json", hidden_act="\x1b[2J")
    assert r"config.json: hidden_act='\x1b[2J' is not supported" in fails("build", mine, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("command", [["build"], ["inspect"]])
def test_a_lora_folder_is_no_model(command: list[str], fails: Fails, mine: Path) -> None:
    (mine / "config.json").rename(mine / "adapter_config.json")
    message = fails(*command, mine)
    why = "not a model; build the model that it was made for, with `--lora"
    assert message.startswith(f"{mine}: a LoRA adapter (adapter_config.json), {why} {mine}`")


def test_build_of_a_tokenizer_that_panics(fails: Fails, mine: Path, tmp_path: Path) -> None:
    edit(mine / "tokenizer.json", normalizer=PANIC)
    assert fails("build", mine, "-o", tmp_path / "out").startswith(f"{mine}/tokenizer.json: ")
    (mine / "tokenizer.json").write_text(POINTER)
    assert "tokenizer.json: a git-lfs pointer, not the file" in fails("build", mine, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_checkpoint_without_a_tokenizer_is_told(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "tokenizer.json").unlink()
    out = tmp_path / "out"
    assert cli.main(["build", str(mine), "-o", str(out), "--target", "cpu", "--precision", "fp32"]) == 0
    told = f"glm4export: note: {mine}: no tokenizer.json; the bundle takes and gives token ids, not text\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("changes", "lines", "message"),
    [
        ({"num_hidden_layers": 2**31}, 1, "num_hidden_layers=2147483648 must be at most 2147483647"),
        ({"num_hidden_layers": 2**30}, 23, "13958643686 tensors do not match config.json"),
        ({"hidden_size": 2**60}, 1, "hidden_size=1152921504606846976 must be at most 2147483647"),
        ({"hidden_size": 2**30}, 22, "mis-shaped lm_head.weight: [420, 64], expected [420, 1073741824]"),
        ({"max_position_embeddings": 10**8}, 1, "max_position_embeddings=100000000 must be at most 16777216"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(
    changes: dict[str, Any],
    lines: int,
    message: str,
    fails: Fails,
    mine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a module is made"))
    edit(mine / "config.json", **changes)
    assert message in fails("build", mine, "-o", tmp_path / "out", lines=lines)


def test_build_of_weights_that_are_not_finite(fails: Fails, mine: Path, tmp_path: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1e6}, mine / "model.safetensors")
    message = fails("build", mine, "-o", tmp_path / "out", "--target", "cpu")
    assert message.startswith("lm_head.weight: a value is not finite in float16;")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("{tmp}/theirs/file", "exists and is not a folder; choose another name with -o"),
        ("{tmp}/theirs", "exists and is not a bundle (no manifest.json); refusing to replace it"),
        ("{tmp}/theirs/file/out", "cannot be written"),
        ("{tmp}/mine", "is the input {tmp}/mine itself; the output must lie apart from it, choose another folder"),
        ("/proc/out", "cannot be written"),
    ],
)
def test_build_into_a_place_that_cannot_be_written(
    out: str, message: str, fails: Fails, mine: Path, tmp_path: Path
) -> None:
    path = out.format(tmp=tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    found = fails("build", mine, "-o", path, "--precision", "fp32", "--target", "cpu")
    assert found.startswith(f"{path}: {message.format(tmp=tmp_path)}")
    assert sorted(tmp_path.rglob("*")) == before


def test_build_on_a_full_disk(fails: Fails, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    message = fails("build", source, "-o", tmp_path / "out", "--precision", "fp32", "--target", "cpu")
    assert re.search(r"the bundle needs 0\.00 GB, the disk has 0\.00 GB free; free some space", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, -1, 65])
def test_build_beyond_the_models_positions(length: int, fails: Fails, source: Path, tmp_path: Path) -> None:
    message = fails("build", source, "-o", tmp_path / "out", f"--max-seq-len={length}")
    assert message.startswith(
        f"--max-seq-len {length} is not in 1..64, the model's positions; for longer texts GLM-4's"
    )


def test_build_with_the_attention_plugin_for_another_target(fails: Fails, source: Path, tmp_path: Path) -> None:
    message = fails("build", source, "-o", tmp_path / "out", "--target", "cpu", "--attention", "plugin")
    assert message.startswith(
        "--attention plugin goes with --target tensorrt and --precision fp16, bf16, int8, int4, not"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head-bits", "4"], "--head-bits goes with --precision int8 or int4, not with fp16; leave it out"),
        (["--embedding-bits", "16"], "--embedding-bits goes with --precision int8 or int4, not with fp16; leave it"),
        (["--asymmetric", "--precision", "fp32"], "--asymmetric goes with --precision int8 or int4, not with fp32"),
        (["--block-size", "16", "--precision", "bf16", "--target", "cuda"], "--block-size goes with --precision"),
        (["--revision", "v2"], "--revision goes with a hub id, not with "),
        (["--target", "tensorrt", "--engine", "none", "--workspace", "2"], "--workspace does not go with --engine"),
    ],
)  # fmt: skip
def test_options_that_nothing_would_use(
    options: list[str], message: str, fails: Fails, source: Path, tmp_path: Path
) -> None:
    assert fails("build", source, "-o", tmp_path / "out", "--target", "cpu", *options).startswith(message)
    assert not (tmp_path / "out").exists()


def test_build_prints_what_it_made(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(source), "--precision", "fp32", "--target", "cpu", "--max-seq-len", "40"]
    assert cli.main([*arguments, "-o", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir() if path.name != MANIFEST)
    out = str(tmp_path / "a")
    assert facts == {
        "bundle": out,
        "target": "cpu",
        "precision": "fp32",
        "bytes": size,
        "max_seq_len": 40,
        "cache_dtype": "float32",
    }
    assert captured.err == ""
