"""What an observed run notes is what transformers' model computes, and holds at positions the text doesn't reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Glm4ForCausalLM

from glm4export.calibration import observe as module
from glm4export.calibration.observe import CACHE_HEADROOM, Observation, observe
from glm4export.sources.checkpoint import Checkpoint
from glm4export.sources.config_json import read_config
from glm4graphs.rope import rotary_tables
from tests.helpers import checkpoints
from tools.geometries import GEOMETRIES as FAMILY

SEQUENCES = [list(range(20)), [7, 3, 5], list(range(60, 30, -1))]  # unequal: padding must leave no trace
GEOMETRIES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied, no bias, full rotary, mqa": {
        "tie_word_embeddings": True,
        "attention_bias": False,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
}


def observed_by_hooks(model: Glm4ForCausalLM) -> tuple[list[Tensor], list[Tensor], dict[str, float]]:
    """Rotated keys and values of every layer, each [tokens, kv_heads, head_dim], and largest inputs of every linear."""
    inputs: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
            inputs[name] = max(inputs.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    tied = model.config.tie_word_embeddings
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear):
            stored = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
            child.register_forward_pre_hook(note(stored))
    caches = []
    with torch.no_grad():
        for tokens in SEQUENCES:
            cache = DynamicCache()
            model(torch.tensor([tokens]), past_key_values=cache)
            caches.append(cache)
    layers = range(model.config.num_hidden_layers)
    keys, values = (
        [torch.cat([getattr(cache.layers[layer], part)[0].transpose(0, 1) for cache in caches]) for layer in layers]
        for part in ("keys", "values")
    )
    return keys, values, inputs


@pytest.mark.parametrize("name", GEOMETRIES)
def test_is_what_transformers_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoints.random_model(**GEOMETRIES[name])
    folder = checkpoints.save(model, tmp_path)
    config, checkpoint = read_config(folder / "config.json"), Checkpoint.open(folder)
    keys, values, inputs = observed_by_hooks(model)
    real = module.windows
    for elements in (1 << 24, 1000):  # whole linears, and windows of rows
        monkeypatch.setattr(module, "windows", lambda shape, most=elements: real(shape, most))
        found = observe(config, checkpoint, SEQUENCES)
        assert found.inputs == pytest.approx(inputs, rel=1e-4)
        for layer in range(config.num_hidden_layers):
            torch.testing.assert_close(found.values[layer], values[layer].abs().amax(0), rtol=1e-4, atol=1e-5)
            rotary, fixed = keys[layer][..., : config.rotary_dim], keys[layer][..., config.rotary_dim :]
            lengths = (rotary[..., 0::2].square() + rotary[..., 1::2].square()).sqrt().amax(0)
            torch.testing.assert_close(found.keys[layer][:, 0 : config.rotary_dim : 2], lengths, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.keys[layer][:, 1 : config.rotary_dim : 2], lengths, rtol=1e-4, atol=1e-5)
            if fixed.shape[-1]:
                other = found.keys[layer][:, config.rotary_dim :]
                torch.testing.assert_close(other, fixed.abs().amax(0), rtol=1e-4, atol=1e-5)


def test_a_key_far_away_is_in_reach() -> None:
    """GLM-4's slowest pairs turn by a radian in some 7000 tokens."""
    config = FAMILY["glm-4-9b"]
    key = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    key[..., 62] = 50.0  # a channel of the slowest pair, its partner small
    cos, sin = rotary_tables(config, 30000)
    even, odd = key[..., 0:64:2], key[..., 1:64:2]
    turned = torch.stack((even * cos[:, None] - odd * sin[:, None], odd * cos[:, None] + even * sin[:, None]), -1)
    everywhere = torch.cat((turned.flatten(-2), key[..., 64:].expand(30000, 1, 64)), -1)
    near = everywhere[:256]
    reach = module._reach_rotated(near, config.rotary_dim)
    assert (everywhere.abs().amax(0) <= reach * (1 + 1e-5)).all()
    assert everywhere.abs().amax(0)[0, 63] > 20 * near.abs().amax(0)[0, 63]  # which the text alone did not show


def test_scales_reach_beyond_the_text_and_are_never_zero() -> None:
    keys = torch.tensor([[1.27, 0.0, 127.0]])
    scales = Observation((keys,), (torch.zeros(1, 3),), {}).cache_scales(0, "key")
    assert scales.shape == (1, 1, 3)
    np.testing.assert_allclose(scales[0, 0].numpy(), CACHE_HEADROOM * np.array([0.01, 0.001, 1.0]), rtol=1e-6)
    silent = Observation((keys,), (torch.zeros(1, 3),), {}).cache_scales(0, "value")
    assert torch.isfinite(silent).all() and (silent > torch.finfo(torch.float32).tiny).all()
