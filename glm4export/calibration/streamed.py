"""The PyTorch definition in fp32, run one layer at a time: the truth that a bundle is compared with.

Weights of one block are in memory at once, so that a model larger than the machine can still be verified, and what a
long text needs grows with its length, not with the square. Nothing that the build decided is asked: which tensor is the
head is read from the checkpoint by transformers' rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from glm4export.sources.checkpoint import Checkpoint
from glm4export.weights.storage import EMBEDDING, HEAD
from glm4export.weights.tensors import whole
from glm4export.weights.write import windows
from glm4graphs.attention import rotate
from glm4graphs.blocks import Attention, DecoderLayer, rms_norm
from glm4graphs.config import Glm4Config
from glm4graphs.rope import rotary_tables

_MASK_ELEMENTS = 1 << 24  # of the mask of the rows that attend at once: 64 MiB as float32
_MLP_ROWS = 1024  # rows that are fed forward at once: their widest tensor has 188 MB at 32B


@dataclass(frozen=True)
class Text:
    """A sequence of token ids; logits are wanted from position ``first`` on."""

    tokens: Sequence[int]
    first: int


def reference_logits(
    config: Glm4Config, checkpoint: Checkpoint, texts: Sequence[Text], done: Callable[[], object] = lambda: None
) -> list[np.ndarray]:
    """Logits of every text, each float32 [len(tokens) - first, vocab]. ``done`` is called behind each layer."""
    rows = torch.cat(hidden_states(config, checkpoint, texts, done))
    logits = _head(checkpoint, config, rows).numpy()
    return np.split(logits, np.cumsum([len(text.tokens) - text.first for text in texts])[:-1])


def hidden_states(
    config: Glm4Config, checkpoint: Checkpoint, texts: Sequence[Text], done: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """The last hidden states of every text, normed, each float32 [len(tokens) - first, hidden]."""
    with torch.no_grad():
        hidden = [_embed(checkpoint, config, text.tokens) for text in texts]
        longest = max(len(text.tokens) for text in texts)
        rotary = rotary_tables(config, longest)
        for index in range(config.num_hidden_layers):
            layer = _layer(checkpoint, config, index)
            hidden = [layer(x, _UNUSED, (_UNUSED, _UNUSED), rotary)[0] for x in hidden]
            done()
        with torch.device("meta"):
            norm = rms_norm(config)
        _load(norm, checkpoint, "model.norm.")
        return [norm(x[0, text.first :]) for x, text in zip(hidden, texts, strict=True)]


_UNUSED = torch.empty(0)  # the mask and the cache of a layer: a text is seen whole


class _WholeText(nn.Module):
    """Attention of one text that is seen whole, without a cache, by PyTorch's own operator."""

    def __init__(self, of: Attention) -> None:
        super().__init__()
        self.of = of

    def forward(
        self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, None]:
        """x: [1, seq, hidden]. Some rows attend at a time, so that their mask is of bounded size."""
        of, config, seq = self.of, self.of.config, x.shape[1]
        cos, sin = (table[:seq] for table in rotary)
        key = rotate(_heads(of.k_proj(x), config.head_dim), cos, sin)  # [1, kv_heads, seq, head_dim]
        value = _heads(of.v_proj(x), config.head_dim)
        groups = config.num_attention_heads // config.num_key_value_heads
        attended = torch.empty_like(x)
        step = max(1, _MASK_ELEMENTS // seq)
        for first in range(0, seq, step):
            last = min(first + step, seq)
            query = rotate(_heads(of.q_proj(x[:, first:last]), config.head_dim), cos[first:last], sin[first:last])
            visible = torch.arange(last) <= torch.arange(first, last)[:, None]
            rows = []
            for index in range(config.num_key_value_heads):
                heads = query[:, index * groups : (index + 1) * groups]
                seen_key, seen_value = (part[:, index, None, :last].expand(-1, groups, -1, -1) for part in (key, value))
                rows.append(nn.functional.scaled_dot_product_attention(heads, seen_key, seen_value, visible))
            attended[:, first:last] = of.o_proj(torch.cat(rows, dim=1).transpose(1, 2).flatten(2))
        return attended, None


class _ByRows(nn.Module):
    """A module of rows, run over some of them at a time."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.of(rows) for rows in torch.split(x, _MLP_ROWS, dim=1)], dim=1)


def _layer(checkpoint: Checkpoint, config: Glm4Config, index: int) -> nn.Module:
    with torch.device("meta"):
        layer = DecoderLayer(config).eval()
    _load(layer, checkpoint, f"model.layers.{index}.")
    layer.set_submodule("self_attn", _WholeText(layer.self_attn))
    layer.set_submodule("mlp", _ByRows(layer.mlp))
    return layer


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(1, x.shape[1], -1, head_dim).transpose(1, 2)  # [1, heads, seq, head_dim]


def _embed(checkpoint: Checkpoint, config: Glm4Config, tokens: Sequence[int]) -> Tensor:
    rows = {
        token: checkpoint.read(EMBEDDING, ((token, token + 1), (0, config.hidden_size))).float()
        for token in sorted(set(tokens))
    }
    return torch.cat([rows[token] for token in tokens])[None]


def _load(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    state = {
        name: checkpoint.read(prefix + name, whole(tuple(tensor.shape))).float()
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)


def _head(checkpoint: Checkpoint, config: Glm4Config, rows: Tensor) -> Tensor:
    """A stored head is the head, whatever the config ties: transformers 5 ties none that differs from the embedding."""
    name = HEAD if HEAD in checkpoint.tensors else EMBEDDING
    shape = (config.vocab_size, config.hidden_size)
    return torch.cat([rows @ checkpoint.read(name, window).float().T for window in windows(shape)], dim=-1)
