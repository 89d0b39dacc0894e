"""The geometry of one GLM-4 model. ``glm4export.sources.config_json`` reads it from config.json, strictly."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by ``factor``."""

    factor: float
    rope_type: str = field(default="linear", init=False)

    def positions(self, max_position_embeddings: int) -> int:
        """The most positions that the model is made for; ``max_position_embeddings`` counts those unstretched."""
        return max(max_position_embeddings, int(self.factor * max_position_embeddings))


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: beyond ``max_position_embeddings`` each run's length gives a base of its own.

    Rows in a cache keep the base of the run that wrote them, so no table holds what comes then.
    """

    factor: float  # without effect up to there
    rope_type: str = field(default="dynamic", init=False)

    def positions(self, max_position_embeddings: int) -> int:
        """The most positions that one table is exact for."""
        return max_position_embeddings


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
    rope_type: str = field(default="yarn", init=False)

    def positions(self, max_position_embeddings: int) -> int:
        """The most positions that the model is made for."""
        return max(max_position_embeddings, int(self.factor * self.original_max_position_embeddings))


@dataclass(frozen=True)
class LongropeScaling:
    """LongRoPE (Ding et al., 2024, https://arxiv.org/abs/2402.13753) within the original length: its short factors.

    A run that reaches past that length takes the long factors for all its positions, while rows in a cache keep the
    short ones, so no table holds what comes then.
    """

    factor: float  # of which attention_factor None is inferred
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]  # [rotary_dim / 2]
    attention_factor: float | None = None  # scale of cos and sin
    rope_type: str = field(default="longrope", init=False)

    def positions(self, max_position_embeddings: int) -> int:
        """The most positions that one table is exact for."""
        return min(max_position_embeddings, self.original_max_position_embeddings)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow dims divided by ``factor``, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = field(default="llama3", init=False)

    def positions(self, max_position_embeddings: int) -> int:
        """The most positions that the model is made for."""
        return max_position_embeddings


Scaling = LinearScaling | DynamicScaling | YarnScaling | LongropeScaling | Llama3Scaling


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, the rotated share of each head, and how it is stretched."""

    theta: float
    partial_rotary_factor: float
    scaling: Scaling | None = None  # None: rope_type "default"

    @property
    def rope_type(self) -> str:
        """config.json's name for how it is stretched."""
        return "default" if self.scaling is None else self.scaling.rope_type


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
        """The most positions that the model is made for, as its rope stretches them, and that a table is exact for."""
        scaling, positions = self.rope.scaling, self.max_position_embeddings
        return positions if scaling is None else scaling.positions(positions)

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim
