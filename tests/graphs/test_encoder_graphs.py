"""The graphs without a cache as PyTorch modules, before they are traced: padding and pooling.

Models of all kinds are in test_generated_configs.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4export.sources.config_json import read_config
from glm4graphs.encoder import EncoderGraph, Encoding
from tests.helpers.checkpoints import save
from tests.helpers.encoders import BATCHES, PAD, batch, output_of, pooled, random_encoder
from tests.helpers.parity import TOLERANCE


def graph_of(model: Any, folder: Path, encoding: Encoding) -> EncoderGraph:
    graph = EncoderGraph(read_config(save(model, folder) / "config.json"), 64, encoding).eval()
    state = model.state_dict()
    if encoding.task == "features":
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    graph.load_state_dict(state)  # strict: parameters have the checkpoint's names
    return graph


def run(graph: EncoderGraph, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return graph({"input_ids": ids, "attention_mask": mask})


def test_without_a_pad_token_the_last_place_counts(tmp_path: Path) -> None:
    """As transformers has it, which refuses a second text then."""
    model = random_encoder("sequence-classification", pad_token_id=None)
    graph = graph_of(model, tmp_path, Encoding("sequence-classification", 3))
    ids = torch.tensor([[5, PAD, 7, PAD]])
    found, wanted = run(graph, ids, torch.ones_like(ids)), output_of(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        output_of(model, ids.expand(2, -1), torch.ones(2, 4, dtype=torch.long))


def test_pad_tokens_inside_a_text_and_a_mask_with_holes(tmp_path: Path) -> None:
    """Pooling goes by the pad token, attention by the mask: each for itself."""
    model = random_encoder("sequence-classification")
    graph = graph_of(model, tmp_path, Encoding("sequence-classification", 3, PAD))
    ids = torch.tensor([[5, PAD, 7, 9], [PAD, 6, 8, PAD]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]])
    torch.testing.assert_close(run(graph, ids, mask), output_of(model, ids, mask), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("pooling", "normalize"), itertools.product(("last", "mean"), (False, True)))
def test_pooled_embeddings(pooling: str, normalize: bool, tmp_path: Path) -> None:
    model = random_encoder("features")
    graph = graph_of(model, tmp_path, Encoding("features", pooling=pooling, normalize=normalize))
    for lengths, side in itertools.product(BATCHES.values(), ("right", "left")):
        ids, mask = batch(lengths, side, 96)
        embeddings = pooled(output_of(model, ids, mask), mask, pooling, normalize)
        torch.testing.assert_close(run(graph, ids, mask), embeddings, rtol=0, atol=TOLERANCE)
