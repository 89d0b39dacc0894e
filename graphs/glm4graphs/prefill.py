"""The prefill graph: a prompt, or a chunk of one, in; the logits of each row's last real token out."""

from __future__ import annotations

from torch import Tensor

from glm4graphs.model import Cache, Glm4ForCausalLM


class Prefill(Glm4ForCausalLM):
    """input_ids int64 [batch, seq] -> logits float32 [batch, 1, vocab] and the written cache.

    Rows are right-padded and ``attention_mask`` [batch, total] tells their real lengths. Only one row a sequence
    reaches the head, the widest matmul of the model.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Cache
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        hidden, presents = self.model(input_ids, attention_mask, cache)
        past = attention_mask.shape[1] - input_ids.shape[1]
        last = attention_mask.sum(1, keepdim=True) - 1 - past  # [batch, 1], index into seq
        rows = last[..., None].expand(-1, -1, hidden.shape[-1])
        return self.head(hidden.gather(1, rows)), presents
