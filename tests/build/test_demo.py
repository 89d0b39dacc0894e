"""The embedded checkpoint answers its listed prompts, in every precision, through the whole runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import SamplingParams, Session
from glm4runtime.text.chat import parse_tool_calls, split_thought
from tests.helpers.demo import DEMO, PROMPTS


def test_fits_its_size_and_lists_enough_prompts() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 8 * 1024 * 1024
    assert len(PROMPTS) >= 20


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=[prompt["name"] for prompt in PROMPTS])
def test_greedy_answers_are_exact(prompt: dict[str, Any], precision: str, demo_sessions: dict[str, Session]) -> None:
    stream = demo_sessions[precision].chat(
        prompt["messages"], SamplingParams(max_new_tokens=200), tools=prompt.get("tools")
    )
    assert stream.read() == prompt["answer"]
    assert stream.finish_reason == "stop"
    assert stream.stop_text == prompt["stop"]


def test_a_tool_call_and_a_thought_are_among_them() -> None:
    answers = [prompt["answer"] for prompt in PROMPTS]
    calls = [call for answer in answers for call in parse_tool_calls(answer)]
    assert calls and all(call.name == "get_weather" and call.arguments["city"] for call in calls)
    assert any(split_thought(answer)[0] for answer in answers)


def test_streamed_pieces_are_whole_characters(demo_sessions: dict[str, Session]) -> None:
    unicode_prompts = [prompt for prompt in PROMPTS if not prompt["answer"].isascii()]
    assert unicode_prompts
    for prompt in unicode_prompts:
        pieces = list(demo_sessions["fp32"].chat(prompt["messages"], tools=prompt.get("tools")))
        assert "".join(pieces) == prompt["answer"]
        assert not any("\ufffd" in piece for piece in pieces)


def test_held_out_text_is_far_better_predicted_than_by_a_unigram_model(demo_sessions: dict[str, Session]) -> None:
    session = demo_sessions["fp32"]
    tokens = session.tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))[:1024]
    losses = []
    for start in range(0, len(tokens), 256):
        window = tokens[start : start + 256]
        session.runner.rewind()
        logits = session.runner.prefill(window[:1])
        for token in window[1:]:
            row = logits.astype(np.float64)
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
            logits = session.runner.decode(token)
    counts = np.bincount(tokens, minlength=session.manifest.vocab_size)
    frequencies = counts[counts > 0] / len(tokens)
    # the entropy of the text's own token frequencies: no unigram model of it can do better
    unigram = float(-(frequencies * np.log(frequencies)).sum())
    assert np.exp(np.mean(losses)) < np.exp(unigram) / 2


def test_checkpoint_files_are_only_the_formats_it_promises() -> None:
    suffixes = {path.suffix for path in Path(DEMO).iterdir() if path.is_file()}
    assert suffixes <= {".json", ".jinja", ".safetensors", ".txt", ".md"}
