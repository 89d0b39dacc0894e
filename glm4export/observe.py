"""What a model's numbers reach on a text: largest magnitudes of keys, of values, and of every linear's input.

The float32 model runs over the text one layer at a time, and each linear is read in windows of rows, used and dropped.
In memory are the text's activations and one window. A visitor is shown every linear with its input on the way, so that
calibration needs no second pass; see :mod:`glm4export.calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm4export.checkpoint import Checkpoint
from glm4export.recipes import whole
from glm4export.weights import windows
from glm4graphs.config import Glm4Config
from glm4graphs.model import DecoderLayer, rms_norm
from glm4graphs.rope import rotary_tables

CACHE_STEPS = 127  # of an int8 cache, between zero and the largest number it holds
# How far beyond the text's largest magnitude a cache's range goes. On the embedded model, calibrated on prose: mean KL
# to fp32 on more of that prose 2.8e-5 with 1, 5.8e-5 with 1.5, 1.0e-4 with 2; on chats 7.1e-4, 3.6e-5, 1.1e-5.
CACHE_HEADROOM = 1.5
_NARROWEST = 1e-3  # a channel's range is at least this share of its layer's widest: some text may wake a quiet channel

Progress = Callable[[int], None]  # told how many more weights were read
Take = Callable[[Tensor], None]  # given a linear's weight window by window, float32 [rows, in]
Visit = Callable[[str, Tensor], AbstractContextManager[Take | None]]
"""Called with the name of a linear's weight and its inputs, float32 [tokens, in]; linears that read one tensor are
given one object. The context is left when the whole weight was taken."""


@dataclass(frozen=True)
class Observation:
    """Largest magnitudes seen, all of the checkpoint's own model: power-of-two rescaling for fp16 comes on top."""

    keys: tuple[Tensor, ...]  # a layer: float32 [kv_heads, head_dim], over all positions that a key can be rotated to
    values: tuple[Tensor, ...]  # a layer: float32 [kv_heads, head_dim]
    inputs: Mapping[
        str, float
    ]  # of each linear, by the checkpoint's name of its weight (a tied head's: the embedding's)

    def cache_scales(self, layer: int, part: str) -> Tensor:
        """Size of an int8 cache's step in each channel of a layer's ``key`` or ``value``: [kv_heads, 1, head_dim]."""
        reach = (self.keys if part == "key" else self.values)[layer]
        least = max(_NARROWEST * float(reach.max()), 1e-30)  # all zeros: 0 / step must not be 0 / 0
        return reach.clamp(min=least).mul(CACHE_HEADROOM / CACHE_STEPS)[:, None]


def observe(
    config: Glm4Config,
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    visit: Visit = lambda name, inputs: nullcontext(),
    progress: Progress = lambda count: None,
) -> Observation:
    """Run the float32 model over sequences of token ids, and note what its numbers reach."""
    run = _Run(checkpoint, sequences, visit, progress)
    keys, values = [], []
    with torch.no_grad():
        x = _embed(checkpoint, run.padded)
        batch, length, _ = x.shape
        rotary = rotary_tables(config, length)
        cache = torch.zeros(batch, config.num_key_value_heads, length, config.head_dim)
        for index in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = DecoderLayer(config)
            x, present = _stream(layer, run, f"model.layers.{index}.")(x, run.mask, (cache, cache), rotary)
            key, value = (tensor.transpose(1, 2)[run.mask.bool()] for tensor in present)  # [tokens, kv_heads, head_dim]
            keys.append(_reach_rotated(key, config.rotary_dim))
            values.append(value.abs().amax(0))
        with torch.device("meta"):
            norm = rms_norm(config)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        run.linear(head, _stream(norm, run, "model.norm.")(x), wanted=False)
    return Observation(tuple(keys), tuple(values), run.inputs)


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
        self, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], visit: Visit, progress: Progress
    ) -> None:
        self.checkpoint, self.visit, self.progress = checkpoint, visit, progress
        self.inputs: dict[str, float] = {}
        tensors = [torch.tensor(sequence) for sequence in sequences]
        self.padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        self.mask = (torch.arange(self.padded.shape[1]) < lengths[:, None]).long()
        self._latest: tuple[Tensor, Tensor] | None = None

    def linear(self, name: str, x: Tensor, *, wanted: bool = True) -> Tensor:
        """``x @ weight.T`` for x [batch, length, in], window by window (empty unless ``wanted``)."""
        rows = self._real_rows(x)
        self.inputs[name] = float(rows.abs().max())
        outputs = []
        with self.visit(name, rows) as take:
            for window in windows(self.checkpoint.tensors[name].shape) if wanted or take else ():
                weight = self.checkpoint.read(name, window).float()
                if wanted:
                    outputs.append(x @ weight.T)
                if take:
                    take(weight)
                self.progress(weight.numel())
        return torch.cat(outputs, -1) if wanted else x[:0]

    def _real_rows(self, x: Tensor) -> Tensor:
        """Without the padding, [tokens, in]; the same object again for the next reader of that very tensor."""
        if self._latest is None or self._latest[0] is not x:
            self._latest = None  # frees the one before
            self._latest = (x, x.flatten(0, 1) if self.mask.all() else x[self.mask.bool()])
        return self._latest[1]


class _Linear(nn.Module):
    """A linear that reads its weight as it runs."""

    def __init__(self, run: _Run, name: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.run, self.name, self.bias = run, name, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.run.linear(self.name, x)
        return y if self.bias is None else y.add_(self.bias)


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
    return module.eval()


def _embed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """float32 [*tokens.shape, hidden]."""
    name = "model.embed_tokens.weight"
    shape = checkpoint.tensors[name].shape
    x = torch.empty(*tokens.shape, shape[1])
    for window in windows(shape):
        first, last = window[0]
        here = (tokens >= first) & (tokens < last)
        x[here] = checkpoint.read(name, window)[tokens[here] - first].float()
    return x
