"""GLM-4-0414's block, written to be traced: parameter names are the checkpoint's, the cache is explicit.

A block's output passes a second RMSNorm before it joins the residual stream ("sandwich norms"):
``h = x + post_self_attn_layernorm(attention(input_layernorm(x)))``,
``out = h + post_mlp_layernorm(mlp(post_attention_layernorm(h)))``.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from glm4graphs.activations import ACTIVATIONS
from glm4graphs.attention import attention, full_attention
from glm4graphs.config import Glm4Config

KeyValue: TypeAlias = tuple[Tensor, Tensor]  # a layer's key and value, each [batch, kv_heads, max_seq, head_dim]


class Attention(nn.Module):
    """Projections around ``glm4::attention``, or without a past around ``glm4::full_attention``."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.config = config
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=bias)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, attention_mask: Tensor, past: KeyValue | None, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, KeyValue | None]:
        config = self.config
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim**-0.5)
        if past is None:
            return self.o_proj(full_attention(*projected, attention_mask, *rotary, *sizes)), None
        attended, key, value = attention(*projected, *past, attention_mask, *rotary, *sizes)
        return self.o_proj(attended), (key, value)


class MLP(nn.Module):
    """Gated feed-forward; ``gate_up_proj`` holds the gate's rows first, then up's."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gating = ACTIVATIONS[config.hidden_act]
        self.sizes = [config.intermediate_size, config.intermediate_size]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).split(self.sizes, dim=-1)
        down: Tensor = self.down_proj(self.gating(gate, up))
        return down


class DecoderLayer(nn.Module):
    """One block: attention and feed-forward, each between two norms."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.input_layernorm = rms_norm(config)
        self.self_attn = Attention(config)
        self.post_self_attn_layernorm = rms_norm(config)
        self.post_attention_layernorm = rms_norm(config)
        self.mlp = MLP(config)
        self.post_mlp_layernorm = rms_norm(config)

    def forward(
        self, x: Tensor, attention_mask: Tensor, past: KeyValue | None, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, KeyValue | None]:
        attended, present = self.self_attn(self.input_layernorm(x), attention_mask, past, rotary)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), present


def rms_norm(config: Glm4Config) -> nn.RMSNorm:
    """The norm that GLM-4 uses everywhere, over the hidden size."""
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
