"""What every GLM-4 graph shares: embedding, blocks and the final norm, as parts that a graph composes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glm4graphs.blocks import DecoderLayer, KeyValue, rms_norm
from glm4graphs.config import Glm4Config
from glm4graphs.rope import rotary_tables

Cache = Sequence[KeyValue]  # of each layer


class Backbone(nn.Module):
    """The parameters that checkpoints call ``model.``; ``max_seq_len`` sizes the rotary tables.

    A graph calls its parts: ``embed_tokens``, :meth:`blocks` and, on the rows that it needs, ``norm``.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: Glm4Config, max_seq_len: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = rms_norm(config)
        meta = self.norm.weight.is_meta
        cos, sin = (None, None) if meta else rotary_tables(config, max_seq_len)
        shape = (max_seq_len, config.rotary_dim // 2)
        self.register_buffer("rotary_cos", torch.empty(shape) if cos is None else cos, persistent=False)
        self.register_buffer("rotary_sin", torch.empty(shape) if sin is None else sin, persistent=False)

    def blocks(self, x: Tensor, attention_mask: Tensor, cache: Cache) -> tuple[Tensor, list[KeyValue]]:
        """Run all blocks over x [batch, seq, hidden]: the stream, not normed, and the cache with the new rows."""
        rotary, presents = self._rotary(x.dtype), []
        for layer, past in zip(self.layers, cache, strict=True):
            x, present = layer(x, attention_mask, past, rotary)
            presents.append(present)
        return x, presents

    def whole_text(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """The same without a cache: attention_mask is int64 [batch, seq], 0 for padding on either side."""
        rotary = self._rotary(x.dtype)
        for layer in self.layers:
            x, _ = layer(x, attention_mask, None, rotary)
        return x

    def _rotary(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.rotary_cos.to(dtype), self.rotary_sin.to(dtype)
