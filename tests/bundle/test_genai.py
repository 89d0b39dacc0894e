"""The bundle's decode graph under onnxruntime-genai, unchanged: the same greedy tokens as our own loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm4runtime import Session, load
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.greedy import genai_greedy, our_greedy


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_embedded_model(precision: str, demo_bundles: dict[str, Path], demo_sessions: dict[str, Session]) -> None:
    session = demo_sessions[precision]
    prompt = session.tokenizer.encode("[gMASK]<sop><|user|>\nWhat is the capital of France?<|assistant|>\n")
    assert genai_greedy(demo_bundles[precision], prompt, 40) == our_greedy(session, prompt, 40)


def test_random_model(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(seed=3), precision="fp32", target="cpu")
    prompt = [9, 8, 7, 6]
    assert genai_greedy(bundle, prompt, 40) == our_greedy(load(bundle), prompt, 40)
