"""The graphs: which rows of the hidden states reach which head.

All take input_ids int64 [batch, seq], attention_mask int64 [batch, total] and the cache; what they are called outside,
and what else they take, is their signature (:mod:`glm4export.graph.signature`). The head is the widest matmul of the
model, so only the rows that are wanted reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from glm4graphs.backbone import Backbone, Cache
from glm4graphs.config import Glm4Config
from glm4graphs.heads import CausalLMHead

Inputs = Mapping[str, Tensor]
Rows = Callable[[Inputs], Tensor | None]  # int64 [batch, rows], indices into seq; None for every row


def every_row(inputs: Inputs) -> None:
    """The logits of every position given, as runtimes that know the ecosystem's names expect."""


def chosen_rows(inputs: Inputs) -> Tensor:
    """All phases in one graph, whose weights are then in memory once.

    A prompt asks for its last row's logits only, a decode step for its one row's, the verification of drafts for every
    row's.
    """
    return inputs["logit_rows"]


class Graph(nn.Module):
    """Embedding, blocks, norm, and a head on some of the rows."""

    def __init__(self, config: Glm4Config, max_seq_len: int, rows: Rows, head: type[CausalLMHead]) -> None:
        super().__init__()
        self.rows = rows
        self.model = Backbone(config, max_seq_len)
        self.head = head.name
        self.add_module(head.name, head(config))

    def forward(self, inputs: Inputs, cache: Cache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The head's output, float32 [batch, rows, ...], and the cache with the new rows written."""
        x = self.model.embed_tokens(inputs["input_ids"])
        hidden, presents = self.model.blocks(x, inputs["attention_mask"], cache)
        rows = self.rows(inputs)
        if rows is not None:
            hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        output: Tensor = self.get_submodule(self.head)(self.model.norm(hidden))
        return output.float(), presents


GRAPHS: dict[str, tuple[Rows, type[CausalLMHead]]] = {
    "prefill": (chosen_rows, CausalLMHead),
    "decode": (every_row, CausalLMHead),
    "step": (chosen_rows, CausalLMHead),
}
