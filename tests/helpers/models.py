"""Shared by tests: generated models of every rope type and activation, and how a config.json may spell them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Glm4ForCausalLM

from glm4graphs.activations import ACTIVATIONS
from tests.helpers import checkpoints

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Generated:
    """What transformers makes of ``fields``; ``null`` are fields that config.json gives as null, of that meaning."""

    fields: dict[str, Any]
    null: tuple[str, ...]
    older: bool  # the spelling of the GLM-4-0414 checkpoints
    positions: int  # that are compared: beyond the original length where the type has tables for that

    @property
    def name(self) -> str:
        return f"{self.fields['rope_parameters']['rope_type']}-{self.fields['hidden_act']}"


def generated(seed: int, **fixed: Any) -> Generated:
    """A small model's fields from a seed; its rope type and activation go round with it."""
    rng = random.Random(seed)
    kind = ROPE_TYPES[seed % len(ROPE_TYPES)]
    heads, kv_heads = rng.choice([(4, 2), (4, 1), (2, 2), (4, 4), (6, 3)])
    narrow = rng.random() < 0.3  # head_dim is what hidden_size and heads give
    head_dim = 16 if narrow else rng.choice([16, 32, 48])
    rotary = rng.choice([0.5, 1.0]) if head_dim % 32 else rng.choice([0.25, 0.5, 1.0])
    positions = rng.choice([24, 40])
    fields = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": 16 * heads if narrow else rng.choice([32, 56]),
        "intermediate_size": rng.choice([48, 100]),
        "num_hidden_layers": rng.choice([1, 2]),
        "hidden_act": sorted(ACTIVATIONS)[seed % len(ACTIVATIONS)],
        "attention_bias": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.4,
        "rms_norm_eps": rng.choice([1e-5, 1.5625e-07]),
        "max_position_embeddings": positions,
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": rng.choice([100.0, 10000.0, 1e6]),
            "partial_rotary_factor": rotary,
            **_scaling(kind, rng, positions, int(head_dim * rotary) // 2),
        },
        **fixed,
    }
    if kind == "llama3":
        fields["max_position_embeddings"] = 96
    null = ("head_dim",) * narrow + ("num_key_value_heads",) * (heads == kv_heads)
    compared = {"linear": 2 * positions, "yarn": 2 * positions, "llama3": 90, "longrope": positions // 2}
    return Generated(fields, null, rng.random() < 0.5, compared.get(kind, positions))


def _scaling(kind: str, rng: random.Random, positions: int, frequencies: int) -> dict[str, Any]:
    """A type's parameters, the optional ones now and then."""

    def some(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if rng.random() < 0.5}

    factor = {"factor": rng.choice([2, 2.0, 3.7, 8.0])}
    if kind in ("linear", "dynamic"):
        return factor
    if kind == "yarn":
        optional = some(
            original_max_position_embeddings=positions,
            attention_factor=1.25,
            beta_fast=8,
            beta_slow=0.5,
            mscale=0.707,
            mscale_all_dim=1.0,
            truncate=False,
        )
        return {**factor, **optional}
    if kind == "longrope":
        lists = {name: [rng.uniform(1, 4) for _ in range(frequencies)] for name in ("short_factor", "long_factor")}
        return {**lists, "original_max_position_embeddings": positions // 2, **some(**factor, attention_factor=1.2)}
    if kind == "llama3":
        return {**factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    return {}


def save(generated: Generated, model: Glm4ForCausalLM, folder: Path) -> Path:
    """The checkpoint, its config.json as ``generated`` spells it."""
    path = checkpoints.save(model, folder) / "config.json"
    path.write_text(json.dumps(spelled(generated, json.loads(path.read_text()))))
    return folder


def spelled(generated: Generated, data: dict[str, Any]) -> dict[str, Any]:
    """transformers' config.json as ``generated`` spells it."""
    data = {**data, **dict.fromkeys(generated.null)}
    if not generated.older:
        return data
    scaling = dict(data.pop("rope_parameters"))
    top = {name: scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    scaling["type"] = scaling.pop("rope_type")
    return {**data, **top, "rope_scaling": None if scaling == {"type": "default"} else scaling}
