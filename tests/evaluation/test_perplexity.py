"""Perplexity by windows beside transformers' recipe for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.cli import main
from glm4export.evaluation.perplexity import perplexity
from glm4runtime import Session
from glm4runtime.contract import UserError
from tests.helpers.demo import DEMO

TEXT = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:1500]


@pytest.fixture(scope="module")
def session(demo_sessions: dict[str, Session]) -> Session:
    return demo_sessions["fp32"]


def sliding_window(ids: list[int], window: int, stride: int, head: list[int]) -> tuple[float, int]:
    """The recipe of transformers' page on perplexity: nats, and tokens scored."""
    model = Glm4ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    nats, tokens, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = torch.tensor([[*head, *ids[begin:end]]])
        labels = inputs.clone()
        labels[:, : inputs.shape[1] - (end - before)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        nats, tokens, before = nats + loss.item() * count, tokens + count, end
        if end == len(ids):
            break
    return nats, tokens


@pytest.mark.parametrize(
    ("window", "stride", "prefix"), [(2048, 1024, ""), (64, 32, ""), (64, 63, ""), (50, 7, "[gMASK]<sop>")]
)
def test_windows_are_scored_as_transformers_page_does(session: Session, window: int, stride: int, prefix: str) -> None:
    head = session.tokenizer.encode(prefix)
    nats, tokens = sliding_window(session.tokenizer.encode(TEXT), window, stride, head)
    found = perplexity(session, TEXT, window=min(window, session.runner.max_seq_len), stride=stride, prefix=prefix)
    assert found.tokens == tokens
    assert found.nats_per_token == pytest.approx(nats / tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_bytes_are_those_of_the_tokens_that_are_scored(session: Session) -> None:
    text = "Ünïcode: 漢字 and 🙂, in bytes."
    first = len(session.tokenizer.token_bytes(session.tokenizer.encode(text)[0]))
    assert perplexity(session, text).bytes == len(text.encode()) - first
    found = perplexity(session, text, prefix="[gMASK]<sop>")
    assert found.bytes == len(text.encode())
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)


def test_the_command(demo_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    given = ["perplexity", str(demo_bundles["fp32"]), "--text", str(file), "--window", "64"]
    assert main([*given, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["window"] == 64 and figures["stride"] == 32
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nats_per_token"]))
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert f"perplexity      {figures['perplexity']:.4f}\n" in shown
    assert f"scored          {figures['tokens']} tokens, {figures['bytes']} bytes; windows of 64, 32 apart\n" in shown


def test_mistakes(session: Session, demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    most = session.runner.max_seq_len + 1
    with pytest.raises(UserError, match=f"--window {most + 1}: expected 2 to {most}"):
        perplexity(session, TEXT, window=most + 1)
    with pytest.raises(UserError, match=f"--prefix has {most} tokens and the cache {most - 1}, which leaves no room"):
        perplexity(session, TEXT, prefix="<sop>" * most)
    with pytest.raises(UserError, match="--stride 64: expected 1 to 63"):
        perplexity(session, TEXT, window=64, stride=64)
    with pytest.raises(UserError, match="the text has 1 tokens; at least 2 are needed"):
        perplexity(session, "a")
    assert main(["perplexity", str(demo_bundles["fp32"]), "--text", "nowhere.txt"]) == 2
    assert "nowhere.txt: cannot be read as text" in capsys.readouterr().err
