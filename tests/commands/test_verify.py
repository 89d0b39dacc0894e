"""``glm4export verify``: its report, thresholds, phases, and the checkpoint it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from glm4export import cli
from tests.commands.conftest import Fails
from tests.helpers.edits import drop, edit


def test_verify(built: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(built), "--checkpoint", str(source), "--steps", "3", "--prompt", "hello world"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.endswith("\npassed\n")
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "fp32" and report["target"] == "cpu" and report["failures"] == []
    assert [phase["name"] for phase in report["phases"]] == ["prefill", "decode", "continuation", "chat", "chunks"]
    assert [phase["positions"] for phase in report["phases"]] == [1, 3, 1, 4, 2 + 16]
    for phase in report["phases"]:
        assert 0 <= phase["mean_abs"] <= phase["max_abs"] < 1e-4 and phase["mean_kl"] < 1e-6 and phase["top1"] == 1
    assert report["greedy"] == [{"prompt": "hello world", "tokens": 3, "parts_at": None}]
    assert report["left_out"] == ["long: the last rows of the cache are compared with --long"]
    assert report["cache_clipped"] is None
    assert cli.main([*arguments, "--long", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["phases"][-1]["name"], report["phases"][-1]["positions"], report["left_out"]) == ("long", 4 + 16, [])


@pytest.mark.parametrize(
    ("threshold", "found", "count"),
    [
        (["--max-kl=-1"], "prefill: mean KL .* exceeds", 5),
        (["--max-kl", "nan"], "prefill: mean KL .* exceeds", 5),
        (["--min-top1", "1.01"], r"top-1 agreement 100\.00% over \d+ positions is below 101\.0%", 1),
    ],
)
def test_verify_past_its_thresholds(
    threshold: list[str], found: str, count: int, built: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "verify",
        str(built),
        "--checkpoint",
        str(source),
        "--steps",
        "1",
        "--prompt",
        "hello world",
        *threshold,
    ]
    assert cli.main(arguments) == 1
    ending = "1 check" if count == 1 else f"{count} checks"
    assert re.search(rf"FAILED: {found}.*\n(.*\n)*{ending} failed\n$", capsys.readouterr().out)
    assert cli.main([*arguments, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["failures"]) == count


@pytest.mark.parametrize(
    ("arguments", "phases"),
    [
        (["--steps", "0", "--prompt", "hello world"], ["prefill", "continuation", "chat", "chunks"]),
        (["--steps", "2", "--prompt", "h"], ["prefill", "decode", "chat", "chunks"]),  # one token can't be cut in two
        (["--prompt", "hello " * 100], ["prefill", "continuation", "chat", "chunks"]),  # fills the cache
    ],
)
def test_verify_leaves_out_phases_without_a_position(
    arguments: list[str], phases: list[str], built: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(built), "--checkpoint", str(source), "--json", *arguments]) == 0
    assert [phase["name"] for phase in json.loads(capsys.readouterr().out)["phases"]] == phases


@pytest.mark.parametrize("length", ["1", "5"])
def test_verify_without_a_tokenizer(
    length: str, bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(bundle, "tokenizer.json")
    assert cli.main(["verify", str(bundle), "--checkpoint", str(source), "--max-seq-len", length, "--json"]) == 0
    prompts = [greedy["prompt"] for greedy in json.loads(capsys.readouterr().out)["greedy"]]
    assert prompts == [f"{count} random tokens" for count in (1, 5) if count <= int(length)]


def test_verify_needs_the_right_checkpoint(fails: Fails, built: Path, source: Path, mine: Path) -> None:
    assert fails("verify", built) == "the bundle was built from a local folder; name it with --checkpoint FOLDER"
    assert "nowhere: no such folder" in fails("verify", built, "--checkpoint", "/nowhere")
    edit(mine / "config.json", rms_norm_eps=1e-6)
    message = fails("verify", built, "--checkpoint", mine)
    assert message == f"{mine}: not the checkpoint that this bundle was built from (config or tensors differ)"
    assert fails("verify", built, "--checkpoint", source, "--steps=-1") == "steps=-1 must be at least 0"
    assert fails("verify", built, "--checkpoint", source, "--prompt", "").startswith("the prompt is empty")
