"""Random models of transformers' heads without a cache, and batches of padded texts to compare on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Glm4Config, Glm4ForSequenceClassification, Glm4ForTokenClassification, Glm4Model

from tests.helpers.checkpoints import SMALL, scatter
from tests.helpers.parity import PARTIAL

CLASSES: dict[str, Any] = {
    "features": Glm4Model,
    "sequence-classification": Glm4ForSequenceClassification,
    "token-classification": Glm4ForTokenClassification,
}
PAD = SMALL["pad_token_id"]

#: Rows of lengths, padded to the longest; 0 is a row of padding only.
BATCHES = {
    "no padding": [6, 6],
    "unequal": [7, 3, 5],
    "one token": [1, 4],
    "a row of padding": [5, 0, 2],
    "alone": [9],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa, no bias": {"num_key_value_heads": 1, "attention_bias": False},
    "mha, one layer": {"num_key_value_heads": 4, "num_hidden_layers": 1},
    "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 128, "num_attention_heads": 2},
    "odd sizes": {"num_hidden_layers": 3, "hidden_size": 72, "intermediate_size": 100, "vocab_size": 131},
    "full rotary, gelu": {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 1.0}, "hidden_act": "gelu"},
}


def random_encoder(task: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model with the head of ``task`` and three labels, its norms and biases made to matter."""
    torch.manual_seed(seed)
    settings = {**SMALL, "num_labels": 3, **overrides}
    return scatter(CLASSES[task](Glm4Config(**settings)).eval())


def batch(lengths: list[int], side: str, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random token ids with padding on a side, and their mask, both int64 [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        ids[row, real] = torch.randint(PAD + 1, vocab_size, (length,), generator=generator)
        mask[row, real] = 1
    return ids, mask


def pooled(hidden: Tensor, mask: Tensor, pooling: str | None, normalize: bool) -> Tensor:
    """Embeddings [batch, hidden] of hidden states [batch, seq, hidden], row by row; without a pooling, those."""
    if pooling is None:
        return hidden
    rows = []
    for row, real in zip(hidden, mask.bool(), strict=True):
        tokens = row[real]
        if not len(tokens):
            tokens = row[:1] if pooling == "last" else torch.zeros(1, row.shape[1])
        rows.append(tokens[-1] if pooling == "last" else tokens.mean(0))
    return F.normalize(torch.stack(rows)) if normalize else torch.stack(rows)


def output_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """transformers' logits or last hidden state."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask)[0]
