"""``glm4::attention``: rotary, cache update and grouped-query attention as one operator.

One operator, so that the exported graph has one ``glm4::Attention`` node per layer, which each target lowers to what it
runs best. The PyTorch body below is the definition that everything else is compared with. ``glm4::full_attention`` is
the same for graphs without a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DOMAIN = "glm4"
OP_TYPE = "Attention"
FULL_OP_TYPE = "FullAttention"


@torch.library.custom_op("glm4::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate new queries and keys, write keys and values into the cache, attend.

    query: [batch, seq, num_heads * head_dim]; key, value: [batch, seq, kv_num_heads * head_dim];
    past_key, past_value: [batch, kv_num_heads, max_seq, head_dim];
    attention_mask: int64 [batch, total], ones for a row's real tokens, past and new, then zeros;
    cos, sin: [max_seq, rotary_dim / 2].
    Returns the attended [batch, seq, num_heads * head_dim] and the cache with the new rows written.

    With ``total == seq`` nothing is past and rows are right-padded prompts. Otherwise the last ``seq`` of a row's real
    tokens are new: rows may have unequal lengths. The same reading as com.microsoft::GroupQueryAttention's.
    """
    batch, seq, _ = query.shape
    max_seq, head_dim = past_key.shape[2:]
    total = attention_mask.shape[1]
    lengths = attention_mask.sum(1)
    start = torch.zeros_like(lengths) if total == seq else lengths - seq
    positions = start[:, None] + torch.arange(seq, device=query.device)  # [batch, seq]

    def heads(x: Tensor, count: int) -> Tensor:  # [batch, count, seq, head_dim]
        return x.view(batch, seq, count, head_dim).transpose(1, 2)

    cos_rows, sin_rows = cos[positions][:, None], sin[positions][:, None]
    q = rotate(heads(query, num_heads), cos_rows, sin_rows)
    k = rotate(heads(key, kv_num_heads), cos_rows, sin_rows)
    rows = positions[:, None, :, None].expand(batch, kv_num_heads, seq, head_dim)
    present_key = past_key.scatter(2, rows, k)
    present_value = past_value.scatter(2, rows, heads(value, kv_num_heads))

    groups = num_heads // kv_num_heads
    scores = q @ present_key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    visible = torch.arange(max_seq, device=query.device) <= positions[:, None, :, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    attended = weights @ present_value.repeat_interleave(groups, 1)
    return attended.transpose(1, 2).reshape(batch, seq, -1), present_key, present_value


@attention.register_fake
def _attention_shapes(  # type: ignore[no-untyped-def]
    query, key, value, past_key, past_value, attention_mask, cos, sin, num_heads, kv_num_heads, scale
):
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


@torch.library.custom_op("glm4::full_attention", mutates_args=())
def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> Tensor:
    """Rotate queries and keys of whole texts and attend, each token to the real ones up to itself.

    query: [batch, seq, num_heads * head_dim]; key, value: [batch, seq, kv_num_heads * head_dim];
    attention_mask: int64 [batch, seq], 0 for padding, on whichever side; positions count it too;
    cos, sin: [max_seq, rotary_dim / 2].
    Returns the attended [batch, seq, num_heads * head_dim]: zero where a token sees no real one, as PyTorch's own
    operator has it, and so transformers.
    """
    batch, seq, _ = query.shape

    def heads(x: Tensor, count: int) -> Tensor:  # [batch, count, seq, head_dim]
        return x.view(batch, seq, count, -1).transpose(1, 2)

    q = rotate(heads(query, num_heads), cos[:seq], sin[:seq])
    k = rotate(heads(key, kv_num_heads), cos[:seq], sin[:seq])
    causal = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    visible = causal & (attention_mask != 0)[:, None, None]  # [batch, 1, seq, seq]
    attended = F.scaled_dot_product_attention(q, k, heads(value, kv_num_heads), visible, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).reshape(batch, seq, -1)


@full_attention.register_fake
def _full_attention_shapes(  # type: ignore[no-untyped-def]
    query, key, value, attention_mask, cos, sin, num_heads, kv_num_heads, scale
):
    return torch.empty_like(query)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading columns of x [batch, heads, seq, head_dim] as adjacent pairs; the rest passes through."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., rotary_dim:]), -1)
