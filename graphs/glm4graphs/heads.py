"""Heads: what makes a graph's output of normed hidden states. Each is a module by the checkpoint's name for it."""

from __future__ import annotations

from torch import nn

from glm4graphs.config import Glm4Config


class CausalLMHead(nn.Linear):
    """Logits [..., vocab] of hidden states [..., hidden]. A graph stores it apart from the embedding, tied or not."""

    name = "lm_head"

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)


class SequenceClassificationHead(nn.Linear):
    """Logits [..., num_labels] of a text's last hidden state [..., hidden]."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__(hidden_size, num_labels, bias=False)


class TokenClassificationHead(nn.Linear):
    """Logits [..., num_labels] of every token's hidden state. Its dropout does nothing outside training."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__(hidden_size, num_labels)
