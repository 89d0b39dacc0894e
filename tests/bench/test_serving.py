"""``glm4export bench --engine``: figures that follow from one another, mistakes; never how fast this machine is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4export import cli

QUICK = ["--engine", "--batch", "1,3", "--prefill", "20", "--steps", "6", "--repeats", "2"]


def test_json(bundles: dict[str, Path], run: Callable[..., str]) -> None:
    facts = json.loads(run(bundles["fp32"], *QUICK, "--json"))
    assert (facts["precision"], facts["slots"], facts["invariant"]) == ("fp32", 3, False)
    assert (facts["prompt_tokens"], facts["new_tokens"], facts["requests_per_client"]) == (20, 6, 2)
    assert [load["clients"] for load in facts["loads"]] == [1, 3]
    for load in facts["loads"]:
        for name in ("first_token_seconds", "token_seconds"):
            assert 0 < load[name]["p50"] <= load[name]["p99"]
        assert load["tokens_per_second"] > 0 and load["step_seconds"]["median"] > 0
        assert load["overhead"] > -1


def test_table(bundles: dict[str, Path], run: Callable[..., str]) -> None:
    lines = run(bundles["fp32"], *QUICK, "--slots", "4", "--invariant").splitlines()
    assert lines[0].startswith(f"{bundles['fp32']}: fp32, 4 slots, prompts of 20 tokens, answers of 6, 2 for each")
    assert [line.split()[0] for line in lines[2:]] == ["1", "3"]
    assert lines[2].split()[2] == "1.00x"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*QUICK, "--slots", "2"], "3 clients, and the engine has 2 slots"),
        ([*QUICK, "--max-seq-len", "25"], "a prompt of 20 tokens and an answer of 6: a slot holds 2[45]"),
        ([*QUICK, "--plot", "a.png"], "--plot doesn't go with --engine"),
        (["--engine", "--prefill", "8,16"], "all prompts have the same length"),
        (["--slots", "2"], "--slots goes with --engine"),
        ([*QUICK, "--device-id", "1"], "device_id=1 is for cuda and tensorrt"),
        ([*QUICK, "--gpu-mem-limit", "4"], "gpu_mem_limit is for cuda"),
        ([*QUICK, "--cuda-graphs"], "cuda_graphs is for bundles for cuda"),
    ],
)
def test_mistakes(
    options: list[str], message: str, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(bundles["fp32"]), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
