"""The decode graph: logits of every position given. One token a step, or several to verify drafts."""

from __future__ import annotations

from torch import Tensor

from glm4graphs.model import Cache, Glm4ForCausalLM


class Decode(Glm4ForCausalLM):
    """input_ids int64 [batch, seq] -> logits float32 [batch, seq, vocab] and the written cache."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Cache
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        hidden, presents = self.model(input_ids, attention_mask, cache)
        return self.head(hidden), presents
