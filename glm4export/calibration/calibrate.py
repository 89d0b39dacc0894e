"""Quantize each linear by the inputs that it sees while the float32 model runs over a text.

The model streams as :mod:`glm4export.calibration.observe` runs it: each window of a linear is quantized by
:mod:`glm4export.calibration.gptq` when it is there anyway, written out and dropped. In memory are the calibration
tokens' activations, one window, and what one linear's columns are compensated by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm4export.calibration.gptq import Compensation, compensate, compensations
from glm4export.calibration.observe import Observation, observe
from glm4export.sources.checkpoint import Checkpoint, StoredTensor
from glm4export.terminal.progress import Progress
from glm4export.weights.quantize import Quantized, Scheme
from glm4export.weights.tensors import Prequantized, Window
from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError

TOKENS = 4096  # calibrated on unless told otherwise
SEQUENCE = 256  # tokens in a sequence

SchemeFor = Callable[[str], Scheme | None]


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
    """A checkpoint as recipes read it, with what a text told: linears that calibration has quantized, and reaches."""

    checkpoint: Checkpoint
    observation: Observation
    calibration: Calibration

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The checkpoint's."""
        return self.checkpoint.tensors

    def read(self, name: str, window: Window) -> Tensor:
        """As :meth:`Checkpoint.read`."""
        return self.checkpoint.read(name, window)

    def quantized(self, name: str, scheme: Scheme, rows: tuple[int, int]) -> Quantized | None:
        """As :meth:`Calibration.quantized`, where the name was calibrated by that scheme; else as the checkpoint's."""
        if self.calibration.schemes.get(name) == scheme:
            return self.calibration.quantized(name, rows)
        return self.checkpoint.quantized(name, scheme, rows) if isinstance(self.checkpoint, Prequantized) else None

    def quantized_rows(
        self, name: str, dtype: str, scale_dtype: torch.dtype, rows: tuple[int, int]
    ) -> Quantized | None:
        """As the checkpoint's, where it has quantized tensors."""
        if not isinstance(self.checkpoint, Prequantized):
            return None
        return self.checkpoint.quantized_rows(name, dtype, scale_dtype, rows)

    def cache_scales(self, layer: int, part: str) -> Tensor:
        """As :meth:`Observation.cache_scales`."""
        return self.observation.cache_scales(layer, part)

    def input_reach(self, name: str) -> float:
        """The largest magnitude that a linear's input had."""
        return self.observation.inputs[name]


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
) -> Calibrated:
    """Observe the model, and quantize every linear that ``scheme_for`` (given the weight's name) has a scheme for.

    Inputs are those of the float32 model: on the embedded checkpoint the inputs that the quantized layers before
    would give are no better (mean KL 2.90e-3 and 2.91e-3), and cost a second pass. An embedding isn't a linear; tied to
    the head it is quantized as the head. Quantized linears are kept in ``folder``.
    """
    quantizer = _Quantizer(scheme_for, Calibration(folder, {}, {}))
    observation = observe(config, checkpoint, sequences, quantizer, progress)
    return Calibrated(checkpoint, observation, quantizer.calibration)


class _Quantizer:
    """A visitor that quantizes the linears that have a scheme."""

    def __init__(self, scheme_for: SchemeFor, calibration: Calibration) -> None:
        self.scheme_for, self.calibration = scheme_for, calibration
        self._latest: tuple[Tensor, int, list[Compensation]] | None = None

    def wants(self, name: str) -> bool:
        return self.scheme_for(name) is not None

    def take(self, name: str, inputs: Tensor, first: int, weight: Tensor) -> None:
        scheme = self.scheme_for(name)
        assert scheme is not None
        self.calibration.schemes[name], self.calibration.columns[name] = scheme, weight.shape[1]
        self.calibration.add(name, first, compensate(weight, scheme, self._compensations(inputs, scheme)))

    def _compensations(self, inputs: Tensor, scheme: Scheme) -> list[Compensation]:
        """Kept for the next reader of that very tensor: queries, keys and values share one input."""
        if self._latest is None or self._latest[0] is not inputs or self._latest[1] != scheme.block:
            self._latest = None  # frees the one before
            self._latest = (inputs, scheme.block, compensations(inputs, scheme.block))
        return self._latest[2]
