"""Graphs without a cache: a batch of whole texts in, hidden states, embeddings or a classifier's logits out.

The counterparts of transformers' ``Glm4Model``, ``Glm4ForSequenceClassification`` and ``Glm4ForTokenClassification``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm4graphs.backbone import Backbone
from glm4graphs.config import Glm4Config
from glm4graphs.heads import SequenceClassificationHead, TokenClassificationHead

FEATURES, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION = (
    "features", "sequence-classification", "token-classification",
)  # fmt: skip
HEADS: dict[str, type[SequenceClassificationHead] | type[TokenClassificationHead]] = {
    SEQUENCE_CLASSIFICATION: SequenceClassificationHead,
    TOKEN_CLASSIFICATION: TokenClassificationHead,
}
POOLINGS = ("last", "mean")
_LEAST_NORM = 1e-12  # what a vector is divided by at least, as torch.nn.functional.normalize has it


@dataclass(frozen=True)
class Encoding:
    """What a graph without a cache makes of texts."""

    task: str  # FEATURES, or a key of HEADS
    num_labels: int = 0  # of the classifiers
    pad_token_id: int | None = None  # sequence classification; None takes one text at a time
    pooling: str | None = None  # features: None gives every token's hidden state, else one of POOLINGS
    normalize: bool = False  # features with a pooling: embeddings of length 1


class EncoderGraph(nn.Module):
    """Embedding, blocks, norm, and what :class:`Encoding` asks for."""

    def __init__(self, config: Glm4Config, max_seq_len: int, encoding: Encoding) -> None:
        super().__init__()
        self.encoding = encoding
        self.model = Backbone(config, max_seq_len)
        if encoding.task in HEADS:
            self.score = HEADS[encoding.task](config.hidden_size, encoding.num_labels)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """inputs: ``input_ids`` and ``attention_mask``, int64 [batch, seq]. Positions count from the row's first place,
        padding or not, as in transformers.

        Returns float32: features [batch, seq, hidden], pooled [batch, hidden]; logits [batch, num_labels] of a
        sequence, [batch, seq, num_labels] of its tokens.
        """
        ids, mask, encoding = inputs["input_ids"], inputs["attention_mask"], self.encoding
        hidden = self.model.whole_text(self.model.embed_tokens(ids), mask)
        if encoding.task == SEQUENCE_CLASSIFICATION:
            pad = encoding.pad_token_id
            hidden = hidden[:, -1:] if pad is None else _row(hidden, _last(ids != pad))
        elif encoding.pooling == "last":
            hidden = _row(hidden, _last(mask != 0))
        output: Tensor = self.model.norm(hidden)
        if encoding.task in HEADS:
            output = self.score(output)
        output = output.float()
        if encoding.pooling == "mean":
            real = (mask != 0).float()[..., None]
            output = (output * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1.0)
        if encoding.task == SEQUENCE_CLASSIFICATION or encoding.pooling:
            output = output.squeeze(1)
        if encoding.normalize:
            output = output / output.square().sum(-1, keepdim=True).sqrt().clamp(min=_LEAST_NORM)
        return output


def _last(wanted: Tensor) -> Tensor:
    """The last place of each row where ``wanted`` is true, int64 [batch, 1]; the first place of a row without one."""
    places = torch.arange(wanted.shape[1], device=wanted.device)
    return (places * wanted).amax(1, keepdim=True)


def _row(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
