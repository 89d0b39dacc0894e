"""``glm4export inspect``: a bundle, and a model before it is built."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file

from glm4export import cli
from glm4export.inspection.estimate import estimate
from glm4export.sources.config_json import read_config
from glm4runtime.contract import MANIFEST
from tests.commands.conftest import EOS, Fails
from tests.conftest import Build
from tests.helpers.checkpoints import save
from tests.helpers.edits import edit
from tests.helpers.encoders import CLASSES, random_encoder


def test_inspect_of_absurd_sizes_is_arithmetic(mine: Path, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    most = 2**31 - 1
    edit(mine / "config.json", num_hidden_layers=most, intermediate_size=2**30, max_position_embeddings=2**24)
    assert cli.main(["inspect", str(mine), "--target", "tensorrt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == most * (64 * 3 * 2**30 + 2 * 64 * 128 + 2 * 64 * 64 + 256 + 4 * 64) + 420 * 128 + 64
    assert cli.main(["inspect", str(mine), "--target", "cpu"]) == 0
    assert "no" in capsys.readouterr().out
    edit(mine / "config.json", hidden_size=2**60)
    assert "hidden_size=1152921504606846976 must be at most" in fails("inspect", mine)


def test_inspect(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(built), "--check-hashes", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = json.loads((built / MANIFEST).read_text())
    assert facts["files"] == manifest["files"] and facts["config"] == manifest["config"]
    assert (facts["target"], facts["precision"], facts["eos_token_ids"]) == ("cpu", "fp32", EOS)
    per_token = 2 * 2 * 2 * 32 * 4
    assert facts["cache"] == {
        "dtype": "float32",
        "max_seq_len": 64,
        "bytes_per_token": per_token,
        "bytes_at_full_length": 64 * per_token,
    }
    for graph in facts["graphs"].values():
        assert graph["nodes"]["GroupQueryAttention"] == 2
        assert 0 < graph["weight_bytes"] <= facts["files"]["weights.bin"]["size"]
    assert cli.main(["inspect", str(built)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{built}: glm4 causal-lm, fp32, for cpu\n")
    assert "2 layers, hidden 64, 4 heads, 2 kv heads of 32, vocabulary 420" in text
    assert (
        "float32, 1.0 KB a token, 65.5 KB at 64 tokens" in text and f"stops on   {', '.join(map(str, EOS))}\n" in text
    )
    for name in facts["files"]:
        assert f"  {name}" in text


@pytest.mark.parametrize(
    ("option", "wrong"),
    [(["--check-hashes"], "model"), (["--target", "cpu"], "bundle"), (["--revision", "v2"], "bundle"),
     (["--token", "x"], "bundle")],
)  # fmt: skip
def test_inspect_with_an_option_of_the_other_kind(
    option: list[str], wrong: str, fails: Fails, built: Path, source: Path
) -> None:
    what, kind = (source, "bundles") if wrong == "model" else (built, "models")
    assert fails("inspect", what, *option) == f"{option[0]} is for {kind}, and {what} is none"


def test_inspect_tells_what_a_model_will_take(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(source), "--target", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert facts["precisions"].keys() == {"fp32", "fp16", "int8", "int4"}  # no bf16 on a CPU
    assert facts["precisions"]["fp32"]["longest_sequence_here"] == facts["max_positions"] == 64


def test_a_session_holds_one_copy_of_the_weights(source: Path) -> None:
    """But on a CPU fp16 weights as fp32, and beside an int8 cache those of both graphs."""
    config = read_config(source / "config.json")
    for target, precision, cache, copies in (
        ("cpu", "fp32", None, 1), ("cpu", "fp16", None, 2), ("cpu", "int4", "int8_cache", 2), ("cuda", "fp16", None, 1),
        ("tensorrt", "fp16", None, 1),
    ):  # fmt: skip
        weights = estimate(config, target, 1)["precisions"][precision]["weight_bytes"]
        row = estimate(config, target, math.ceil((copies + 0.1) * weights / 0.9))["precisions"][precision]
        assert (row if cache is None else row[cache])["longest_sequence_here"] > 0
        row = estimate(config, target, int(copies * weights / 0.9))["precisions"][precision]
        assert (row if cache is None else row[cache])["longest_sequence_here"] == 0


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_inspect_shows_a_model_for_every_target(target: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(source), "--target", target]) == 0
    shown = capsys.readouterr().out
    assert f"for {target} and causal-lm, on this machine" in shown and "fits here" in shown
    assert ("with --kv-cache int8" in shown) is (target != "tensorrt")


@pytest.mark.parametrize("task", CLASSES)
def test_a_model_without_a_cache(
    task: str, build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own head is counted, and neither lm_head nor a cache."""
    model = random_encoder(task)
    folder = save(model, tmp_path)
    assert cli.main(["inspect", str(folder), "--target", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == task and facts["parameters"] == model.num_parameters()
    for precision in ("fp32", "int4"):
        graph = onnx.load(
            build_bundle(folder, precision=precision, target="cpu") / "model.onnx", load_external_data=False
        )
        entries = (entry for tensor in graph.graph.initializer for entry in tensor.external_data)
        stored = sum(int(entry.value) for entry in entries if entry.key == "length")
        assert facts["precisions"][precision] == {"weight_bytes": stored, "fits_here": True}
    assert cli.main(["inspect", str(folder), "--target", "tensorrt"]) == 0
    shown = capsys.readouterr().out
    assert f"for tensorrt and {task}, on this machine" in shown and "cache a token" not in shown and "fp8" not in shown
