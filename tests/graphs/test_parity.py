"""Logits of the built graphs against transformers' Glm4ForCausalLM, fp32, same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.sources.checkpoint import locate
from glm4export.verification.phases import PROMPTS
from glm4runtime import Session, load
from glm4runtime.contract import past_name, present_name
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.parity import GEOMETRIES, TOLERANCE, check_parity, reference


@pytest.fixture(scope="module")
def demo_reference() -> Glm4ForCausalLM:
    return Glm4ForCausalLM.from_pretrained(locate(None).folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["24 heads a kv head", "wide heads", "three layers, odd sizes"])
def test_random_geometries(name: str, build_bundle: Build) -> None:
    """Beside those of test_generated_configs.py: sizes of attention and odd ones, which have kernels of their own."""
    model = checkpoints.random_model(seed=len(name), **GEOMETRIES[name])
    bundle = build_bundle(model, precision="fp32", target="cpu")
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 17).tolist()
    check_parity(load(bundle), model, prompt)


CHAT = "[gMASK]<sop><|user|>\nWhat is the capital of France?<|assistant|>\n"


@pytest.mark.parametrize(
    "prompt", [*PROMPTS, CHAT, "The President of the United States", "It was a dark night at sea, and"]
)
def test_embedded_model(prompt: str, demo_sessions: dict[str, Session], demo_reference: Glm4ForCausalLM) -> None:
    session = demo_sessions["fp32"]
    check_parity(session, demo_reference, session.tokenizer.encode(prompt))


def test_sharded_checkpoint_and_unsimplified_graphs_are_the_same_model(build_bundle: Build, tmp_path: Path) -> None:
    model = checkpoints.random_model()
    sharded = checkpoints.save(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    session = load(build_bundle(sharded, precision="fp32", target="cpu", simplify=False))
    check_parity(session, model, [5, 6, 7])


def test_decode_graph_gives_every_position_and_takes_ragged_batches(build_bundle: Build) -> None:
    """The contract beyond our own loop: right-padded batches in prefill, unequal lengths in decode."""
    model = checkpoints.random_model()
    bundle = build_bundle(model, precision="fp32", target="cpu")
    layers, kv_heads, head_dim = 2, 2, 32
    prompts = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
    lengths = np.array([len(prompt) for prompt in prompts])
    ids, mask = np.zeros((3, 5), np.int64), np.zeros((3, 5), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    names = [(past_name(i, part), present_name(i, part)) for i in range(layers) for part in ("key", "value")]
    cache = {past: np.zeros((3, kv_heads, 16, head_dim), np.float32) for past, _ in names}

    prefill, decode = (ort.InferenceSession(bundle / f"{name}.onnx") for name in ("prefill", "decode"))
    outputs = ["logits", *(present for _, present in names)]
    last = (lengths - 1)[:, None]
    feed = {"input_ids": ids, "attention_mask": mask, **cache}
    logits, *presents = prefill.run(outputs, {**feed, "logit_rows": last})
    every, *_ = decode.run(outputs, feed)
    assert logits.shape == (3, 1, 96) and every.shape == (3, 5, 96)
    for row, prompt in enumerate(prompts):
        wanted = reference(model, prompt)
        assert np.abs(logits[row, 0] - wanted[-1]).max() <= TOLERANCE
        assert np.abs(every[row, : len(prompt)] - wanted).max() <= TOLERANCE

    step = np.array([[31], [32], [33]])
    mask = (np.arange(6) < (lengths + 1)[:, None]).astype(np.int64)
    cache = {past: present for (past, _), present in zip(names, presents, strict=True)}
    logits, *_ = decode.run(outputs, {"input_ids": step, "attention_mask": mask, **cache})
    for row, prompt in enumerate(prompts):
        wanted = reference(model, [*prompt, int(step[row, 0])])[-1]
        assert np.abs(logits[row, 0] - wanted).max() <= TOLERANCE


def test_short_cache_is_the_same_model(build_bundle: Build) -> None:
    """A session's cache may be shorter than the bundle's limit; the rotary tables stay the bundle's."""
    model = checkpoints.random_model()
    session = load(build_bundle(model, precision="fp32", target="cpu"), max_seq_len=8, prefill_chunk=3)
    rows = session.runner.prefill([5, 6, 7, 8, 9, 10, 11]).copy()
    assert np.abs(rows - reference(model, [5, 6, 7, 8, 9, 10, 11])[-1]).max() <= TOLERANCE
    assert dataclasses.asdict(session.manifest.cache)["max_seq_len"] == 64
