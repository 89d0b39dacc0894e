"""Whether a checkpoint's head is its embedding. Decided here, once; all other code asks the config."""

from __future__ import annotations

import dataclasses

import torch

from glm4export.sources.checkpoint import Checkpoint
from glm4export.weights.storage import EMBEDDING, HEAD
from glm4export.weights.write import windows
from glm4graphs.config import Glm4Config


def as_stored(config: Glm4Config, checkpoint: Checkpoint) -> Glm4Config:
    """The config with ``tie_word_embeddings`` as the checkpoint's tensors have it.

    As transformers 5 loads it: a tied config's head is the embedding, unless an ``lm_head.weight`` is stored that
    differs in a single value. (transformers compares in the dtype it loads into; this compares the stored numbers.)
    Reads up to both matrices, in windows, to the first one that differs.
    """
    both = {EMBEDDING, HEAD} <= checkpoint.tensors.keys()
    if not config.tie_word_embeddings or not both or _equal(checkpoint):
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


def _equal(checkpoint: Checkpoint) -> bool:
    embedding, head = checkpoint.tensors[EMBEDDING], checkpoint.tensors[HEAD]
    if embedding.shape != head.shape:
        return False
    dtype = torch.promote_types(embedding.dtype, head.dtype)  # holds the numbers of both exactly
    return all(
        torch.equal(checkpoint.read(EMBEDDING, window).to(dtype), checkpoint.read(HEAD, window).to(dtype))
        for window in windows(embedding.shape)
    )
