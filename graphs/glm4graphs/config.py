"""The geometry of one GLM-4 model. Reading it from config.json, strictly, is ``glm4export.sources.config``'s work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's parameters (Peng et al., 2023, https://arxiv.org/abs/2309.00071), with Hugging Face's defaults."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # scale of cos and sin; None infers it from factor and the mscales
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, the rotated share of each head, and how it is stretched."""

    theta: float
    partial_rotary_factor: float
    linear_factor: float = 1.0  # "linear" scaling divides every frequency by this
    yarn: YarnScaling | None = None


@dataclass(frozen=True)
class Glm4Config:
    """A GLM-4 causal language model, field for field what ``transformers.Glm4Config`` calls it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    rope: Rope

    @property
    def rotary_dim(self) -> int:
        """Leading columns of each head that are rotated, as adjacent pairs."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def query_size(self) -> int:
        """Columns of all query heads together; need not equal ``hidden_size``."""
        return self.num_attention_heads * self.head_dim

    @property
    def max_positions(self) -> int:
        """The most positions that the model was made for, as YaRN stretches them."""
        yarn = self.rope.yarn
        stretched = 0 if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim
