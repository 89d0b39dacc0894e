"""Shared by tests: GEOMETRIES, TOLERANCE, reference, check_parity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Glm4ForCausalLM

from glm4runtime import Session

TOLERANCE = 2e-5  # max absolute logit difference in fp32


STEPS = 32


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0}


GEOMETRIES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "24 heads a kv head": {"num_attention_heads": 24, "num_key_value_heads": 1, "head_dim": 16},
    "wide heads": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "narrow heads": {"head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 3},
    "no bias": {"attention_bias": False},
    "full rotary": {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 1.0}},
    "tied": {"tie_word_embeddings": True},
    "tied, no bias, full rotary, mqa": {
        "tie_word_embeddings": True,
        "attention_bias": False,
        "num_key_value_heads": 1,
        "rope_parameters": {**PARTIAL, "partial_rotary_factor": 1.0},
    },
    "one layer": {"num_hidden_layers": 1},
    "three layers, odd sizes": {"num_hidden_layers": 3, "hidden_size": 72, "intermediate_size": 100, "vocab_size": 131},
    "four layers, other eps": {"num_hidden_layers": 4, "rms_norm_eps": 1.5625e-07},
    "yarn": {
        "rope_parameters": {
            **PARTIAL,
            "rope_type": "yarn",
            "partial_rotary_factor": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def reference(model: Glm4ForCausalLM, tokens: list[int]) -> np.ndarray:
    """transformers' logits of every position, [len(tokens), vocab]."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def check_parity(session: Session, model: Glm4ForCausalLM, prompt: list[int]) -> None:
    """Prefill, greedy decode steps, and the prompt in chunks, each logit within the tolerance."""
    runner = session.runner
    runner.rewind()
    rows, tokens = [runner.prefill(prompt).copy()], list(prompt)
    for _ in range(STEPS):
        tokens.append(int(rows[-1].argmax()))
        rows.append(runner.decode(tokens[-1]).copy())
    wanted = reference(model, tokens)[len(prompt) - 1 :]
    assert np.abs(np.stack(rows) - wanted).max() <= TOLERANCE
    assert tokens[len(prompt) :] == wanted[:-1].argmax(-1).tolist()

    runner.rewind()
    for start in range(0, len(prompt), 5):
        chunk = runner.prefill(prompt[start : start + 5])
    assert np.abs(chunk - wanted[0]).max() <= TOLERANCE
