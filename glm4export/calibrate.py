"""Quantize linears with an eye on their inputs: GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323).

Rounding a column of a weight leaves an error in the layer's output; the columns after it can take most of it back, as
far as their inputs correlate. With ``H = XᵀX`` over calibration inputs X and ``H⁻¹ = UᵀU``, U upper triangular, the
error ``e = (w_j - ŵ_j) / U_jj`` of column j is taken from the columns behind it as ``e * U_jk``. Scales are searched
block by block (:func:`glm4export.quantize.quantize`) on the weights as they are by then, weighed by ``1 / U_jj²``: what
an error costs that the columns behind can't mend.

The model streams as :mod:`glm4export.observe` runs it: each window of a linear is quantized when it is there anyway. In
memory are the calibration tokens' activations, one window and one linear's Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm4export.checkpoint import Checkpoint
from glm4export.observe import Observation, Progress, Take, observe
from glm4export.quantize import Quantized, Scheme, in_threads, joined, pack, quantize, unpack
from glm4export.recipes import Window
from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError

TOKENS = 4096  # calibrated on unless told otherwise
SEQUENCE = 256  # tokens in a sequence
MAX_WINDOW = 4096  # columns that compensate each other: bounds the Hessian's memory, and its time, which is cubic
DAMPING = 0.1  # added to H's diagonal, relative to its mean: less trust in few tokens' correlations

SchemeFor = Callable[[str], Scheme | None]


@dataclass(frozen=True)
class Calibration:
    """Quantized linears of a checkpoint, each in its own file of ``folder``, and what the text's numbers reached."""

    folder: Path
    schemes: dict[str, Scheme]
    observation: Observation

    def __contains__(self, name: str) -> bool:
        return name in self.schemes

    def quantized(self, name: str, rows: tuple[int, int]) -> Quantized:
        """Rows start to stop of the checkpoint tensor ``name``, quantized."""
        with safe_open(_file(self.folder, name), framework="pt") as file:
            data, scales = (file.get_slice(part)[slice(*rows)].clone() for part in ("data", "scales"))
            zero_points = None
            if not self.schemes[name].symmetric:
                zero_points = file.get_slice("zero_points")[slice(*rows)].clone()
        return Quantized(data, scales, zero_points)


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

    def cache_scales(self, layer: int, part: str) -> Tensor:
        """As :meth:`Observation.cache_scales`."""
        return self.calibration.observation.cache_scales(layer, part)


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
    quantizer = _Quantizer(scheme_for, folder)
    observation = observe(config, checkpoint, sequences, quantizer.visit, progress)
    return Calibration(folder, quantizer.schemes, observation)


class _Quantizer:
    """Quantizes the linears that it is shown."""

    def __init__(self, scheme_for: SchemeFor, folder: Path) -> None:
        self.scheme_for, self.folder = scheme_for, folder
        self.schemes: dict[str, Scheme] = {}
        self._latest: tuple[Tensor, int, list[Compensation]] | None = None

    @contextmanager
    def visit(self, name: str, inputs: Tensor) -> Iterator[Take | None]:
        """As :data:`glm4export.observe.Visit`."""
        scheme = self.scheme_for(name)
        if scheme is None:
            yield None
            return
        parts: list[Quantized] = []
        yield lambda weight: parts.append(compensate(weight, scheme, self._compensations(inputs, scheme)))
        self.schemes[name] = scheme
        _save(_file(self.folder, name), joined(parts))

    def _compensations(self, inputs: Tensor, scheme: Scheme) -> list[Compensation]:
        """Kept for the next reader of that very tensor: queries, keys and values share one input."""
        if self._latest is None or self._latest[0] is not inputs or self._latest[1] != scheme.block:
            self._latest = None  # frees the one before
            self._latest = (inputs, scheme.block, compensations(inputs, scheme.block))
        return self._latest[2]


@dataclass(frozen=True)
class Compensation:
    """How columns start to stop of a linear make up for each other: U, float32 [stop - start, stop - start]."""

    start: int
    upper: Tensor


def compensations(
    inputs: Tensor, block: int, *, max_window: int = MAX_WINDOW, damping: float = DAMPING
) -> list[Compensation]:
    """From a linear's inputs [tokens, in]: U of each window of columns, windows being a whole number of blocks."""
    columns = inputs.shape[1]
    found = []
    for start, stop in _cut(columns, block, max_window):
        x = inputs[:, start:stop]
        hessian = x.T @ x
        hessian.diagonal().add_(damping * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny)
        # H = V Vᵀ with V upper triangular is a Cholesky factorisation read backwards; then U = V⁻¹.
        upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
        identity = torch.eye(stop - start)
        found.append(Compensation(start, torch.linalg.solve_triangular(upper, identity, upper=True)))
    return found


def compensate(weight: Tensor, scheme: Scheme, along: Sequence[Compensation]) -> Quantized:
    """Quantize rows [rows, columns] of a linear, each column's error passed on to the columns behind it."""
    rows, threads = len(weight), min(torch.get_num_threads(), len(weight))
    edges = [rows * index // threads for index in range(threads + 1)]
    parts: list[Quantized | None] = [None] * threads

    def work(index: int) -> None:
        parts[index] = _compensate(weight[edges[index] : edges[index + 1]], scheme, along)

    in_threads(work, threads)
    return joined([part for part in parts if part is not None])


def _compensate(weight: Tensor, scheme: Scheme, along: Sequence[Compensation]) -> Quantized:
    rows, columns = weight.shape
    work = weight.float().T.contiguous()  # [columns, rows]: columns are worked on, and lie contiguous
    levels, block = 2**scheme.bits, scheme.block
    q, errors = torch.empty_like(work), torch.empty(block, rows)
    scales = torch.empty(columns // block, rows)
    zero_points = torch.full_like(scales, levels // 2)
    for part in along:
        rest = work[part.start : part.start + len(part.upper)]
        importance = part.upper.diagonal().square().reciprocal()
        for first in range(0, len(rest), block):
            last, at = first + block, (part.start + first) // block
            own = rest[first:last]
            searched = quantize(own.T, scheme, importance[first:last])
            scales[at] = searched.scales[:, 0]
            if searched.zero_points is not None:
                zero_points[at] = unpack(searched.zero_points, scheme.bits, 1)[:, 0]
            inverse = torch.where(scales[at] == 0, 0, 1 / scales[at])
            for column in range(block):
                pivot, used, error = part.upper[first + column], q[part.start + first + column], errors[column]
                torch.mul(own[column], inverse, out=used).round_().add_(zero_points[at]).clamp_(0, levels - 1)
                torch.sub(used, zero_points[at], out=error).mul_(scales[at])
                torch.sub(own[column], error, out=error).div_(pivot[first + column])
                own[column + 1 :].addr_(pivot[first + column + 1 : last], error, alpha=-1)
            rest[last:].addmm_(part.upper[first:last, last:].T, errors, alpha=-1)
    data = pack(q.to(torch.uint8).T, scheme.bits).view(rows, columns // block, -1)
    packed = None if scheme.symmetric else pack(zero_points.to(torch.uint8).T, scheme.bits)
    return Quantized(data, scales.T.contiguous(), packed)


def _cut(columns: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut columns into few windows of about equal size, each a whole number of blocks and at most ``most``."""
    blocks = columns // block
    count = math.ceil(columns / max(block, most // block * block))
    edges = [blocks * index // count * block for index in range(count + 1)]
    return pairwise(edges)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _save(path: Path, quantized: Quantized) -> None:
    tensors = {"data": quantized.data, "scales": quantized.scales}
    if quantized.zero_points is not None:
        tensors["zero_points"] = quantized.zero_points
    save_file(tensors, path)
