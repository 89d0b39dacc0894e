"""Run a checkpoint over a text in float32, layer by layer, and quantize each linear by the inputs that it saw.

The model streams: a linear is read in windows of rows, each of which is used for the float32 output, quantized by
:mod:`glm4export.gptq`, written out and dropped. In memory are the calibration tokens' activations, one window, and what
one linear's columns are compensated by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glm4export.checkpoint import Checkpoint
from glm4export.gptq import Compensation, compensate, compensations
from glm4export.quantize import Quantized, Scheme
from glm4export.recipes import Window, whole
from glm4export.weights import windows
from glm4graphs.attention import attention
from glm4graphs.config import Glm4Config
from glm4graphs.model import Attention, DecoderLayer, rms_norm
from glm4graphs.rope import rotary_tables
from glm4runtime.contract import UserError

TOKENS = 4096  # calibrated on unless told otherwise
SEQUENCE = 256  # tokens in a sequence

SchemeFor = Callable[[str], Scheme | None]
Progress = Callable[[int], None]  # told how many more bytes of weights were read


@dataclass(frozen=True)
class Calibration:
    """Quantized linears of a checkpoint: in ``folder``, each part of each in a file of its own, row after row."""

    folder: Path
    schemes: dict[str, Scheme]
    columns: dict[str, int]

    def __contains__(self, name: str) -> bool:
        return name in self.schemes

    def add(self, name: str, first: int, rows: Quantized) -> None:
        """Store rows of the checkpoint tensor ``name``, from its row ``first`` on."""
        for part, (_, shape) in self._parts(name).items():
            tensor: Tensor = getattr(rows, part)
            path = self.folder / f"{name}.{part}"
            path.touch()
            with path.open("r+b") as file:
                file.seek(first * math.prod(shape) * tensor.itemsize)
                file.write(tensor.contiguous().numpy().data.cast("B"))

    def quantized(self, name: str, rows: tuple[int, int]) -> Quantized:
        """Rows start to stop of the checkpoint tensor ``name``, quantized."""
        first, last = rows

        def read(part: str) -> Tensor:
            dtype, shape = self._parts(name)[part]
            size = math.prod(shape)
            path, offset = self.folder / f"{name}.{part}", first * size * dtype.itemsize
            values = np.fromfile(path, dtype, (last - first) * size, offset=offset)
            return torch.from_numpy(values).view(last - first, *shape)

        return Quantized(read("data"), read("scales"), None if self.schemes[name].symmetric else read("zero_points"))

    def _parts(self, name: str) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Every stored part's dtype, and the shape of a row of it, as :class:`Quantized` has them."""
        scheme, blocks = self.schemes[name], self.columns[name] // self.schemes[name].block
        parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "data": (np.dtype(np.uint8), (blocks, scheme.block * scheme.bits // 8)),
            "scales": (np.dtype(np.float32), (blocks,)),
        }
        if not scheme.symmetric:
            parts["zero_points"] = (np.dtype(np.uint8), (math.ceil(blocks * scheme.bits / 8),))
        return parts


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint as recipes read it, with the linears that calibration has quantized."""

    checkpoint: Checkpoint
    calibration: Calibration

    def read(self, name: str, window: Window) -> Tensor:
        """As :meth:`Checkpoint.read`."""
        return self.checkpoint.read(name, window)

    def quantized(self, name: str, scheme: Scheme, rows: tuple[int, int]) -> Quantized | None:
        """As :meth:`Calibration.quantized`, where the name was calibrated by that scheme."""
        if self.calibration.schemes.get(name) != scheme:
            return None
        return self.calibration.quantized(name, rows)


def linears(config: Glm4Config, checkpoint: Checkpoint) -> list[str]:
    """The weights that :func:`calibrate` reads, and asks for a scheme of."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return [name for name in checkpoint.tensors if name.endswith("_proj.weight")] + [head]


def token_sequences(text: str, folder: Path, *, tokens: int = TOKENS, length: int = SEQUENCE) -> list[list[int]]:
    """The text's first ``tokens`` tokens by the checkpoint's tokenizer, in sequences of ``length``."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; calibration needs the checkpoint's tokenizer")
    ids = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids[:tokens]
    if len(ids) < length:
        raise UserError(f"the calibration text has {len(ids)} tokens; give at least {length}, better {tokens}")
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def calibrate(
    config: Glm4Config,
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    scheme_for: SchemeFor,
    folder: Path,
    progress: Progress = lambda count: None,
) -> Calibration:
    """Quantize every linear that ``scheme_for`` (given the weight's name) has a scheme for, into ``folder``.

    Inputs are those of the float32 model: on the embedded checkpoint the inputs that the quantized layers before
    would give are no better (mean KL 2.90e-3 and 2.91e-3), and cost a second pass. An embedding isn't a linear; tied to
    the head it is quantized as the head.
    """
    run = _Run(checkpoint, scheme_for, Calibration(folder, {}, {}), progress, sequences)
    with torch.no_grad():
        x = _embed(checkpoint, run.padded)
        length = x.shape[1]
        rotary = rotary_tables(config, length)
        cache = torch.zeros(1, config.num_key_value_heads, length, config.head_dim)
        for index in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = DecoderLayer(config)
            x, _ = _stream(layer, run, f"model.layers.{index}.")(x, run.mask, (cache, cache), rotary)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        if scheme_for(head) is not None:
            with torch.device("meta"):
                norm = rms_norm(config)
            x = _stream(norm, run, "model.norm.")(x)
            for rows, _ in windows(checkpoint.tensors[head].shape):
                run.rows(head, x, rows, wanted=False)
    return run.calibration


class _Run:
    """What the streamed linears share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme_for: SchemeFor,
        calibration: Calibration,
        progress: Progress,
        sequences: Sequence[Sequence[int]],
    ) -> None:
        self.checkpoint, self.scheme_for, self.progress = checkpoint, scheme_for, progress
        self.calibration = calibration
        tensors = [torch.tensor(sequence) for sequence in sequences]
        self.padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        self.mask = (torch.arange(self.padded.shape[1]) < lengths[:, None]).long()
        self._latest: tuple[Tensor, int, list[Compensation]] | None = None

    def rows(self, name: str, x: Tensor, rows: tuple[int, int], *, wanted: bool = True) -> Tensor:
        """``x @ weight[rows].T`` for x [..., in] (empty unless ``wanted``); quantizes the rows along the way."""
        columns = self.checkpoint.tensors[name].shape[1]
        weight = self.checkpoint.read(name, (rows, (0, columns))).float()
        scheme = self.scheme_for(name)
        if scheme is not None:
            self.calibration.schemes[name], self.calibration.columns[name] = scheme, columns
            self.calibration.add(name, rows[0], compensate(weight, scheme, self._compensations(x, scheme)))
        self.progress(weight.numel() * self.checkpoint.tensors[name].dtype.itemsize)
        return x @ weight.T if wanted else x[:0]

    def _compensations(self, x: Tensor, scheme: Scheme) -> list[Compensation]:
        """Of that very tensor; kept for its next reader: queries, keys and values share one input."""
        if self._latest is None or self._latest[0] is not x or self._latest[1] != scheme.block:
            self._latest = None  # frees the one before
            real = x.flatten(0, -2) if self.mask.all() else x[self.mask.bool()]  # no copy where nothing was padded
            self._latest = (x, scheme.block, compensations(real, scheme.block))
        return self._latest[2]


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

    def __init__(self, of: Attention) -> None:
        super().__init__()
        self.of = of

    def forward(
        self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, None]:
        of, config = self.of, self.of.config
        query, key, value = of.q_proj(x), of.k_proj(x), of.v_proj(x)
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim**-0.5)
        for index in range(len(x)):
            one = slice(index, index + 1)
            query[one] = attention(query[one], key[one], value[one], *past, mask[one], *rotary, *sizes)[0]
        return of.o_proj(query), None


class _GateUp(nn.Module):
    """Gate and up with the activation between them, some rows of both at a time.

    ``gate_up_proj``'s output for all tokens would be the largest tensor of all, 755 MB at 32B; this is half of it.
    """

    def __init__(self, linear: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        assert isinstance(linear, _Linear)
        self.linear, self.activation = linear, activation

    def forward(self, x: Tensor) -> Tensor:
        run, name, (both, hidden) = self.linear.run, self.linear.name, self.linear.shape
        y = torch.empty(*x.shape[:-1], both // 2)
        for (first, last), _ in windows((both // 2, hidden)):
            gate = self.activation(run.rows(name, x, (first, last)))
            torch.mul(gate, run.rows(name, x, (both // 2 + first, both // 2 + last)), out=y[..., first:last])
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
        module.set_submodule("self_attn", _OneByOne(module.self_attn))
        linear, activation, down = module.mlp.gate_up_proj, module.mlp.activation, module.mlp.down_proj
        module.set_submodule("mlp", nn.Sequential(_GateUp(linear, activation), down))
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
