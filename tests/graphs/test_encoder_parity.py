"""Compiled graphs without a cache in onnxruntime against transformers, same weights, in fp32."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from torch import Tensor

from tests.conftest import Build
from tests.helpers.checkpoints import save
from tests.helpers.encoders import BATCHES, CONFIGS, batch, output_of, random_encoder
from tests.helpers.parity import TOLERANCE

CASES = [  # beside those of test_generated_configs.py
    ("features", "tied, wide heads", "cpu"),
    ("sequence-classification", "full rotary, gelu", "tensorrt"),
    ("token-classification", "odd sizes", "cpu"),
]


def run(bundle: Path, ids: Tensor, mask: Tensor) -> np.ndarray:
    session = ort.InferenceSession(bundle / "model.onnx")
    output: np.ndarray = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    return output


@pytest.mark.parametrize(("task", "name", "target"), CASES)
def test_the_same_as_transformers(task: str, name: str, target: str, build_bundle: Build, tmp_path: Path) -> None:
    model = random_encoder(task, seed=len(name), **CONFIGS[name])
    bundle = build_bundle(save(model, tmp_path), precision="fp32", target=target)
    session = ort.InferenceSession(bundle / "model.onnx")
    expected = "last_hidden_state" if task == "features" else "logits"
    assert [value.name for value in session.get_outputs()] == [expected]
    for lengths, side in itertools.product(BATCHES.values(), ("right", "left")):
        ids, mask = batch(lengths, side, model.config.vocab_size)
        found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        wanted = output_of(model, ids, mask).numpy()
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= TOLERANCE, (lengths, side)


@pytest.mark.parametrize("side", ["right", "left"])
def test_at_the_last_position(side: str, build_bundle: Build, tmp_path: Path) -> None:
    model = random_encoder("sequence-classification", rope_parameters=YARN, max_position_embeddings=64)
    bundle = build_bundle(save(model, tmp_path), precision="fp32", target="cpu")
    ids, mask = batch([64, 40], side, 96)
    assert np.abs(run(bundle, ids, mask) - output_of(model, ids, mask).numpy()).max() <= TOLERANCE
    with pytest.raises(Exception, match="RotaryEmbedding"):
        run(bundle, *batch([65], side, 96))


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_without_a_pad_token_texts_come_one_at_a_time(build_bundle: Build, tmp_path: Path) -> None:
    model = random_encoder("sequence-classification", pad_token_id=None)
    bundle = build_bundle(save(model, tmp_path), precision="fp32", target="cpu")
    ids, mask = batch([7], "right", 96)
    assert np.abs(run(bundle, ids, mask) - output_of(model, ids, mask).numpy()).max() <= TOLERANCE
    with pytest.raises(Exception, match="index: 0 Got: 2 Expected: 1"):
        run(bundle, *batch([7, 7], "right", 96))
