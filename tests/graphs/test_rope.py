"""Every rope type beside transformers: tables to the bit; slices of the family's geometries, built.

Logits of every type are in test_generated_configs.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding

from glm4export.sources.config_json import parse_config
from glm4graphs.rope import rotary_tables
from glm4runtime import load
from glm4runtime.contract import read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.models import Generated, spelled
from tests.helpers.parity import check_parity
from tools.geometries import GEOMETRIES

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32768,
    "short_factor": [1.0 + 0.07 * i for i in range(32)],
    "long_factor": [1.5 + 0.9 * i for i in range(32)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES: list[dict[str, Any]] = [
    {},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": 0.25, "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 1.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 1.1, "rope_theta": 5e5},
    {"rope_type": "dynamic", "factor": 1000.3, "rope_theta": 12345.678},
    {"rope_type": "dynamic", "factor": 2, "partial_rotary_factor": 0.25},
    YARN,
    {**YARN, "factor": 8.0, "partial_rotary_factor": 1.0},
    {**YARN, "factor": 2.5, "rope_theta": 1e6},
    {**YARN, "factor": 1.0},
    {**YARN, "factor": 0.5},
    {**YARN, "factor": None, "original_max_position_embeddings": 8192},
    {**YARN, "truncate": False},
    {**YARN, "truncate": None},
    {**YARN, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "beta_fast": 1e-9, "beta_slow": 1e-9, "truncate": False},  # low == high
    {**YARN, "attention_factor": 1.25},
    {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    {**YARN, "mscale": 0.707},
    {**YARN, "original_max_position_embeddings": 4096},
    LONGROPE,
    {**LONGROPE, "factor": 32.0},
    {**LONGROPE, "factor": 0.5},
    {**LONGROPE, "attention_factor": 1.19},
    {**LONGROPE, "original_max_position_embeddings": 4096},  # its factor is 8
    LLAMA3,
    {**LLAMA3, "factor": 32, "rope_theta": 5e5, "partial_rotary_factor": 1.0},
    {**LLAMA3, "low_freq_factor": 0.7, "high_freq_factor": 30, "original_max_position_embeddings": 300},
]
POSITIONS = [0, 1, 2, 3, 100, 4095, 4096, 32767, 32768, 33000]


def prompt_of(length: int, model: transformers.Glm4ForCausalLM) -> list[int]:
    return np.random.default_rng(length).integers(0, model.config.vocab_size, length).tolist()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_tables_are_transformers(rope: dict[str, Any], older: bool) -> None:
    """cos and sin of each position that a table may have, also past 32768, where an angle's last bit is 2e-3."""
    fields = {"head_dim": 128, "max_position_embeddings": 32768, "rope_parameters": {**DEFAULT, **rope}}
    theirs = transformers.Glm4Config(**{**checkpoints.SMALL, **fields})
    data = spelled(Generated({}, (), older, 0), {**theirs.to_dict(), "architectures": ["Glm4ForCausalLM"]})
    ours = parse_config(data, "c")
    longest = ours.max_positions if ours.rope.rope_type in ("dynamic", "longrope") else POSITIONS[-1] + 1
    positions = torch.tensor([[position for position in POSITIONS if position < longest]])
    expected_cos, expected_sin = Glm4RotaryEmbedding(theirs)(torch.zeros(1), positions)
    cos, sin = rotary_tables(ours, longest)
    half = cos.shape[-1]
    assert expected_cos.shape[-1] == 2 * half
    torch.testing.assert_close(cos[positions[0]], expected_cos[0, :, :half], rtol=0, atol=0)
    torch.testing.assert_close(sin[positions[0]], expected_sin[0, :, :half], rtol=0, atol=0)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0}, LONGROPE], ids=["dynamic", "longrope"])
def test_no_table_holds_what_these_do_beyond_their_original_length(rope: dict[str, Any]) -> None:
    """Why they end there: a position's row depends on how long the run is that it is part of."""
    fields = {"head_dim": 128, "max_position_embeddings": 65536, "rope_parameters": {**DEFAULT, **rope}}
    theirs = transformers.Glm4Config(**{**checkpoints.SMALL, **fields})
    ours = parse_config({**theirs.to_dict(), "architectures": ["Glm4ForCausalLM"]}, "c")

    def row(position: int, run: int) -> Tensor:
        return Glm4RotaryEmbedding(theirs)(torch.zeros(1), torch.tensor([[position, run - 1]]))[0][0, 0]

    limit = ours.max_positions
    assert torch.equal(row(9, 100), row(9, limit))
    assert not torch.allclose(row(9, limit), row(9, limit + 1 + limit // 8))


@pytest.mark.parametrize("name", ["glm-4-9b", "glm-4-32b", "glm-z1-rumination-32b"])
def test_a_slice_of_each_geometry(name: str, build_bundle: Build) -> None:
    """The family's heads, biases and positions on a narrow stream."""
    narrow = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    fields = {**dataclasses.asdict(GEOMETRIES[name]), **narrow}
    rope = fields.pop("rope")
    fields["rope_parameters"] = {"rope_theta": rope["theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    model = checkpoints.random_model(**fields)
    bundle = build_bundle(model, precision="fp32")
    cache = read_manifest(bundle).cache
    kv_heads, positions = (8, 131072) if "rumination" in name else (2, 32768)
    assert (cache.kv_heads, cache.head_dim, cache.max_seq_len) == (kv_heads, 128, positions)
    check_parity(load(bundle, max_seq_len=64), model, prompt_of(17, model))
