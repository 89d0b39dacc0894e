"""The GLM-4-0414 family's geometries, as their config.json files give them: for tests, documentation and benchmarks."""

from __future__ import annotations

from dataclasses import replace

from glm4graphs.config import Glm4Config, Rope

_GLM_4_9B = Glm4Config(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    attention_bias=True,
    tie_word_embeddings=False,
    rope=Rope(theta=10000.0, partial_rotary_factor=0.5),
)
_GLM_4_32B = replace(
    _GLM_4_9B,
    hidden_size=6144,
    intermediate_size=23040,
    num_hidden_layers=61,
    num_attention_heads=48,
    attention_bias=False,
)

GEOMETRIES = {
    "glm-4-9b": _GLM_4_9B,
    "glm-z1-9b": _GLM_4_9B,
    "glm-4-32b": _GLM_4_32B,
    "glm-4-32b-base": _GLM_4_32B,
    "glm-z1-32b": _GLM_4_32B,
    "glm-z1-rumination-32b": replace(_GLM_4_32B, num_key_value_heads=8, max_position_embeddings=131072),
}
