"""The step graph: one for both phases. The logits of any of the given positions, prompt or decode alike.

A TensorRT engine holds the weights of the one graph it was built from; prefill asks it for the last row's logits only,
decode for its one row, and the verification of drafts for every row.
"""

from __future__ import annotations

from torch import Tensor

from glm4graphs.model import Cache, Glm4ForCausalLM


class Step(Glm4ForCausalLM):
    """input_ids int64 [batch, seq] -> logits float32 [batch, rows, vocab] and the written cache.

    ``logit_rows`` int64 [batch, rows] are indices into seq; only those rows reach the head, the widest matmul there is.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logit_rows: Tensor, cache: Cache
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        hidden, presents = self.model(input_ids, attention_mask, cache)
        rows = logit_rows[..., None].expand(-1, -1, hidden.shape[-1])
        return self.head(hidden.gather(1, rows)), presents
