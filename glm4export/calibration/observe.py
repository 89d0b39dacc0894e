"""Largest magnitudes that keys, values and every linear's input reach on a text.

The float32 model runs over the text one layer at a time, and each linear is read in windows of rows, used and dropped.
In memory are the text's activations and one window. A visitor is shown windows and inputs on the way, so that
calibration needs no second pass; see :mod:`glm4export.calibration.calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from glm4export.sources.checkpoint import Checkpoint
from glm4export.terminal.progress import Progress
from glm4export.weights.storage import EMBEDDING, HEAD
from glm4export.weights.tensors import whole
from glm4export.weights.write import windows
from glm4graphs.activations import Gating
from glm4graphs.attention import attention
from glm4graphs.blocks import Attention, DecoderLayer, rms_norm
from glm4graphs.config import Glm4Config
from glm4graphs.rope import rotary_tables

CACHE_STEPS = 127  # of an int8 cache, between zero and the largest number it holds
# How far beyond the text's largest magnitude a cache's range goes. On the embedded model, calibrated on prose: mean KL
# to fp32 on more of that prose 2.8e-5 with 1, 5.8e-5 with 1.5, 1.0e-4 with 2; on chats 7.1e-4, 3.6e-5, 1.1e-5.
CACHE_HEADROOM = 1.5
_NARROWEST = 1e-3  # a channel's range is at least this share of its layer's widest: some text may wake a quiet channel


class Visitor(Protocol):
    """Is shown the linears, by the checkpoint's names of their weights."""

    def wants(self, name: str) -> bool:
        """Whether :meth:`take` is to be called for that weight."""
        ...

    def take(self, name: str, inputs: Tensor, first: int, weight: Tensor) -> None:
        """Rows of the weight, float32 [rows, in], from its row ``first`` on, and the inputs, float32 [tokens, in].

        Linears that read one tensor are given one object.
        """
        ...


class _Nobody:
    """A visitor that wants nothing."""

    def wants(self, name: str) -> bool:
        return False

    def take(self, name: str, inputs: Tensor, first: int, weight: Tensor) -> None:
        raise AssertionError("it wants nothing")


@dataclass(frozen=True)
class Observation:
    """Largest magnitudes seen, all of the checkpoint's own model: power-of-two rescaling for fp16 comes on top."""

    keys: tuple[Tensor, ...]  # a layer: float32 [kv_heads, head_dim], over all positions that a key can be rotated to
    values: tuple[Tensor, ...]  # a layer: float32 [kv_heads, head_dim]
    inputs: Mapping[str, float]  # of each linear, by the name of its weight (a tied head's: the embedding's)

    def cache_scales(self, layer: int, part: str) -> Tensor:
        """Size of an int8 cache's step in each channel of a layer's ``key`` or ``value``: [kv_heads, 1, head_dim]."""
        reach = (self.keys if part == "key" else self.values)[layer]
        least = max(_NARROWEST * float(reach.max()), 1e-30)  # all zeros: 0 / step must not be 0 / 0
        return reach.clamp(min=least).mul(CACHE_HEADROOM / CACHE_STEPS)[:, None]


def linears(config: Glm4Config, checkpoint: Checkpoint) -> list[str]:
    """The weights that :func:`observe` runs through, a tied head's under the embedding's name."""
    return [name for name in checkpoint.tensors if name.endswith("_proj.weight")] + [_head(config)]


def observe(
    config: Glm4Config,
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    visitor: Visitor | None = None,
    progress: Progress = lambda count: None,
) -> Observation:
    """Run the float32 model over sequences of token ids, and note what its numbers reach."""
    run = _Run(config, checkpoint, sequences, visitor or _Nobody(), progress)
    with torch.no_grad():
        x = _embed(checkpoint, run.padded)
        length = x.shape[1]
        rotary = rotary_tables(config, length)
        cache = torch.zeros(1, config.num_key_value_heads, length, config.head_dim)
        for index in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = DecoderLayer(config)
            x, _ = _stream(layer, run, f"model.layers.{index}.")(x, run.mask, (cache, cache), rotary)
        with torch.device("meta"):
            norm = rms_norm(config)
        run.visit(_head(config), _stream(norm, run, "model.norm.")(x))
    return Observation(tuple(run.keys), tuple(run.values), run.inputs)


def _head(config: Glm4Config) -> str:
    return EMBEDDING if config.tie_word_embeddings else HEAD


def _reach_rotated(keys: Tensor, rotary_dim: int) -> Tensor:
    """What each channel of keys [tokens, kv_heads, head_dim] reaches at any position: [kv_heads, head_dim].

    Rotary turns adjacent channels into each other, the slowest pairs of GLM-4 by a radian in 7000 tokens: a short text
    shows one channel large and the other small where a long one has both large. Their common length doesn't turn.
    """
    pairs = keys[..., :rotary_dim].reshape(*keys.shape[:2], -1, 2)
    lengths = pairs.norm(dim=-1).repeat_interleave(2, -1)
    return torch.cat((lengths, keys[..., rotary_dim:].abs()), -1).amax(0)


class _Run:
    """What the streamed linears share."""

    def __init__(
        self,
        config: Glm4Config,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        visitor: Visitor,
        progress: Progress,
    ) -> None:
        self.config, self.checkpoint, self.visitor, self.progress = config, checkpoint, visitor, progress
        self.inputs: dict[str, float] = {}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        tensors = [torch.tensor(sequence) for sequence in sequences]
        self.padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        self.lengths = [len(sequence) for sequence in sequences]
        self.mask = (torch.arange(self.padded.shape[1]) < torch.tensor(self.lengths)[:, None]).long()
        self._latest: tuple[Tensor, Tensor, float] | None = None

    def rows(self, name: str, x: Tensor, rows: tuple[int, int]) -> Tensor:
        """``x @ weight[rows].T`` for x [batch, length, in]; the visitor is shown the rows along the way."""
        weight = self._show(name, x, rows)
        return x @ weight.T

    def visit(self, name: str, x: Tensor) -> None:
        """Show a linear whose output isn't needed; it is read only where the visitor wants it."""
        self._note(name, x)
        if self.visitor.wants(name):
            for rows, _ in windows(self.checkpoint.tensors[name].shape):
                self._show(name, x, rows)

    def note_cache(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Note what a layer's keys and values reach, of every sequence [tokens, kv_heads, head_dim]."""
        self.keys.append(torch.stack([_reach_rotated(key, self.config.rotary_dim) for key in keys]).amax(0))
        self.values.append(torch.stack([value.abs().amax(0) for value in values]).amax(0))

    def _show(self, name: str, x: Tensor, rows: tuple[int, int]) -> Tensor:
        stored = self.checkpoint.tensors[name]
        weight, inputs = self.checkpoint.read(name, (rows, (0, stored.shape[1]))).float(), self._note(name, x)
        if self.visitor.wants(name):
            self.visitor.take(name, inputs, rows[0], weight)
        self.progress(weight.numel() * stored.dtype.itemsize)
        return weight

    def _note(self, name: str, x: Tensor) -> Tensor:
        """x without the padding, [tokens, in]; the same object again for the next reader of that very tensor."""
        if self._latest is None or self._latest[0] is not x:
            self._latest = None  # frees the one before
            real = x.flatten(0, 1) if self.mask.all() else x[self.mask.bool()]  # no copy where nothing was padded
            self._latest = (x, real, max(float(real.max()), -float(real.min())))
        self.inputs[name] = self._latest[2]
        return self._latest[1]


class _Linear(nn.Module):
    """A linear that reads its weight as it runs."""

    def __init__(self, run: _Run, name: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.run, self.name, self.bias = run, name, bias
        self.shape = run.checkpoint.tensors[name].shape

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(*x.shape[:-1], self.shape[0])
        for rows, _ in windows(self.shape):
            y[..., slice(*rows)] = self.run.rows(self.name, x, rows)
        return y if self.bias is None else y.add_(self.bias)


class _OneByOne(nn.Module):
    """Attention of one sequence at a time: the scores of all of them would be 200 MB at 32B, several times over."""

    def __init__(self, of: Attention, run: _Run) -> None:
        super().__init__()
        self.of, self.run = of, run

    def forward(
        self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, None]:
        of, config = self.of, self.of.config
        query, key, value = of.q_proj(x), of.k_proj(x), of.v_proj(x)
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim**-0.5)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for index, length in enumerate(self.run.lengths):
            one = slice(index, index + 1)
            query[one], *present = attention(query[one], key[one], value[one], *past, mask[one], *rotary, *sizes)
            for seen, rows in zip((keys, values), present, strict=True):
                seen.append(rows[0, :, :length].transpose(0, 1))
        self.run.note_cache(keys, values)
        return of.o_proj(query), None


class _GateUp(nn.Module):
    """Gate and up with the activation between them, some rows of both at a time.

    ``gate_up_proj``'s output for all tokens would be the largest tensor of all, 755 MB at 32B; this is half of it.
    """

    def __init__(self, linear: nn.Module, gating: Gating) -> None:
        super().__init__()
        assert isinstance(linear, _Linear)
        self.linear, self.gating = linear, gating

    def forward(self, x: Tensor) -> Tensor:
        run, name, (both, hidden) = self.linear.run, self.linear.name, self.linear.shape
        y = torch.empty(*x.shape[:-1], both // 2)
        for (first, last), _ in windows((both // 2, hidden)):
            gate, up = (run.rows(name, x, (start + first, start + last)) for start in (0, both // 2))
            y[..., first:last] = self.gating(gate, up)
        return y


def _stream(module: nn.Module, run: _Run, prefix: str) -> nn.Module:
    """Make the linears of a module on the meta device stream, and load its other tensors."""
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            module.set_submodule(name, _Linear(run, f"{prefix}{name}.weight", child.bias))
    state = {
        name: run.checkpoint.read(prefix + name, whole(tuple(tensor.shape))).float()
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    if isinstance(module, DecoderLayer):
        module.set_submodule("self_attn", _OneByOne(module.self_attn, run))
        mlp = module.mlp
        module.set_submodule("mlp", nn.Sequential(_GateUp(mlp.gate_up_proj, mlp.gating), mlp.down_proj))
    return module.eval()


def _embed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """float32 [*tokens.shape, hidden]."""
    name = EMBEDDING
    shape = checkpoint.tensors[name].shape
    x = torch.empty(*tokens.shape, shape[1])
    for window in windows(shape):
        first, last = window[0]
        here = (tokens >= first) & (tokens < last)
        x[here] = checkpoint.read(name, window)[tokens[here] - first].float()
    return x
