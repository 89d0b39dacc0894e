"""A quantized checkpoint, read as any other: by the names and shapes of its weights, dequantized row by row.

Where a build stores a weight by integers that are the checkpoint's own, recipes are handed those instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glm4export.sources.checkpoint import CONFIG, QUANTIZED_DTYPES, Checkpoint, CheckpointError, StoredTensor
from glm4export.sources.config_json import config_data, read_config
from glm4export.sources.ledger import expected_shape, mismatches
from glm4export.sources.quantized.declared import HEAD_MODULE, Declared, parse_quantization
from glm4export.sources.quantized.layouts import FLOATS, Layout, ReadPart, Shape
from glm4export.weights.quantize import Quantized, Scheme, pack
from glm4export.weights.storage import HEAD
from glm4export.weights.tensors import Window, whole
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import Encoding

_ONLY_QUANTIZED = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
)
_CHUNK_ELEMENTS = 1 << 20  # weights that are dequantized at once


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint's tensors, dequantized where config.json has a ``quantization_config``.

    Raises CheckpointError as :meth:`Checkpoint.open` does; ConfigError for quantization that isn't read.
    """
    declared = read_quantization(folder)
    if declared is None:
        return Checkpoint.open(folder)
    config = read_config(folder / CONFIG)
    return QuantizedCheckpoint(Checkpoint.open(folder, QUANTIZED_DTYPES), declared, config)


def read_quantization(folder: Path) -> Declared | None:
    """How a checkpoint's config.json says that it is quantized. Raises ConfigError where that isn't read."""
    path = folder / CONFIG
    data = config_data(path).get("quantization_config")
    return None if data is None else parse_quantization(data, str(path))


@dataclass(frozen=True)
class Linear:
    """A quantized linear: its layout, and what the weight is that it stands for."""

    module: str
    layout: Layout
    shape: tuple[int, int]


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint of which some weights are quantized: ``linears``, by the weights' names."""

    def __init__(self, stored: Checkpoint, declared: Declared, config: Glm4Config) -> None:
        self.stored, self.declared = stored, declared
        self.linears: dict[str, Linear] = {}
        self._orders: dict[str, Tensor | None] = {}
        self._centred: dict[str, bool] = {}
        self._positive: dict[str, bool] = {}
        tensors = dict(stored.tensors)
        suffixed = [name.rpartition(".") for name in stored.tensors]
        for module in sorted({module for module, _, part in suffixed if part in _ONLY_QUANTIZED}):
            name = f"{module}.weight"
            shape = expected_shape(name, config)
            if shape is None or len(shape) != 2:
                continue  # the ledger lists its tensors
            fits = {layout: len(self._problems(module, layout, shape)[2]) for layout in declared.layouts}
            # of those that fit alike the one with most parts: a symmetric layout leaves zero points unread
            layout = min(fits, key=lambda layout: (fits[layout], -len(layout.parts(*shape))))
            self.linears[name] = Linear(module, layout, (shape[0], shape[1]))
            parts = [f"{module}.{part}" for part in layout.parts(*shape)]
            file = next((stored.tensors[part].file for part in parts if part in stored.tensors), None)
            for part in parts:
                tensors.pop(part, None)
            if file is not None:
                tensors[name] = StoredTensor(file, shape, torch.float32, name)
        super().__init__(stored.folder, tensors)

    def read(self, name: str, window: Window) -> Tensor:
        """A window of a tensor, in its stored dtype; of a quantized weight, float32, as its codes, zeros and scales."""
        if name not in self.linears:
            return self.stored.read(name, window)
        rows, columns = window
        linear = self.linears[name]
        layout, read, width = linear.layout, self._reader(linear), linear.shape[1]
        if problems := self._problems(linear.module, layout, linear.shape)[2]:
            raise CheckpointError(f"{self.folder}: {problems[0]}")
        try:
            codes = layout.codes(read, rows, columns)
            scales, zeros = layout.scales(read, rows, width), layout.zeros(read, rows, width)
            groups = self._order(name)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {linear.module}: {error}") from None
        if groups is None:
            groups = torch.arange(width) // (layout.group or width)
        groups = groups[slice(*columns)]
        weight = torch.empty(codes.shape)
        step = max(1, _CHUNK_ELEMENTS // max(1, codes.shape[1]))
        for first in range(0, len(codes), step):
            some = slice(first, first + step)
            chunk = codes[some].float()
            if zeros is not None:
                chunk -= zeros[some][:, groups]
            elif not layout.is_float:
                chunk -= 1 << (layout.bits - 1)
            torch.mul(chunk, scales[some][:, groups], out=weight[some])
        return weight

    def has(self, name: str, scheme: Scheme) -> bool:
        """Whether a weight's integers are what that scheme stores: :meth:`quantized` gives them.

        A group's scale may serve several blocks, and 4 bits fit into 8.
        """
        linear = self.linears.get(name)
        if linear is None or linear.layout.is_float or self.is_permuted(name):
            return False
        group, bits = linear.layout.group or linear.shape[1], linear.layout.bits
        as_they_are = bits == scheme.bits and (not scheme.symmetric or self.is_centred(name))
        return (
            group % scheme.block == 0
            and linear.shape[1] % scheme.block == 0
            and (as_they_are or bits < scheme.bits)
            and (not scheme.positive or self._is_positive(name))
        )

    def has_rows(self, name: str, dtype: str) -> bool:
        """Whether a weight has one scale a row, and numbers of that dtype: :meth:`quantized_rows` gives them."""
        linear = self.linears.get(name)
        if linear is None or linear.layout.group is not None or not self._is_positive(name):
            return False
        return linear.layout.is_float if dtype != "int8" else not linear.layout.is_float and self.is_centred(name)

    def is_centred(self, name: str) -> bool:
        """Whether every zero point is half the levels."""
        if name not in self._centred:
            linear = self.linears[name]
            rows, columns = linear.shape
            zeros = linear.layout.zeros(self._reader(linear), (0, rows), columns)
            self._centred[name] = zeros is None or bool((zeros == 1 << (linear.layout.bits - 1)).all())
        return self._centred[name]

    def is_permuted(self, name: str) -> bool:
        """Whether a weight's groups are not of neighbouring columns, as act-order leaves them."""
        return self._order(name) is not None

    def quantized(self, name: str, scheme: Scheme, rows: tuple[int, int]) -> Quantized | None:
        """Rows of a weight as a build stores them: the checkpoint's integers and scales; None where they don't fit."""
        if not self.has(name, scheme):
            return None
        linear = self.linears[name]
        layout, read, width = linear.layout, self._reader(linear), linear.shape[1]
        codes = layout.codes(read, rows, (0, width))
        zeros = layout.zeros(read, rows, width)
        each, blocks = (layout.group or width) // scheme.block, width // scheme.block
        half = 1 << (scheme.bits - 1)
        if zeros is None:
            zeros = torch.full((len(codes), -(-blocks // each)), 1 << (layout.bits - 1), dtype=torch.uint8)
        zeros = zeros.repeat_interleave(each, 1)[:, :blocks]
        if layout.bits < scheme.bits:  # zeros and codes move to the middle of the wider range
            blocked = codes.reshape(len(codes), blocks, scheme.block)
            codes = (blocked + (half - zeros.to(torch.int16)).to(torch.uint8)[..., None]).view(len(codes), width)
            zeros = torch.full_like(zeros, half)
        scales = layout.scales(read, rows, width).repeat_interleave(each, 1)[:, :blocks]
        return Quantized(
            pack(codes, scheme.bits).reshape(len(codes), blocks, -1),
            scales.to(scheme.scale_dtype).float(),
            None if scheme.symmetric else pack(zeros, scheme.bits),
        )

    def quantized_rows(
        self, name: str, dtype: str, scale_dtype: torch.dtype, rows: tuple[int, int]
    ) -> Quantized | None:
        """Rows as int8 or fp8 [rows, columns] with one scale each [rows]; None where the checkpoint's are others."""
        if not self.has_rows(name, dtype):
            return None
        linear = self.linears[name]
        read = self._reader(linear)
        codes = linear.layout.codes(read, rows, (0, linear.shape[1]))
        if dtype == "int8":
            codes = (codes.to(torch.int16) - (1 << (linear.layout.bits - 1))).to(torch.int8)
        scales = linear.layout.scales(read, rows, linear.shape[1])[:, 0]
        return Quantized(codes.contiguous(), scales.to(scale_dtype).float(), None)

    def fingerprint(self) -> str:
        """As :meth:`Checkpoint.fingerprint`, of the tensors that are stored."""
        return self.stored.fingerprint()

    def check(
        self, config: Glm4Config, encoding: Encoding | None = None, brought: Mapping[str, Shape] | None = None
    ) -> None:
        """The ledger, over the tensors that stand for a weight too, and what their data may not be.

        Raises CheckpointError, also where quantization_config says of a linear what its tensors don't.
        """
        super().check(config, encoding, brought)
        says = f"{self.folder}: {CONFIG}'s quantization_config says that"
        if not self.linears:
            raise CheckpointError(f"{says} weights are quantized, and none is; remove it")
        if self.declared.quantized_head and HEAD not in self.linears:
            raise CheckpointError(f"{says} {HEAD_MODULE} is quantized, and {HEAD} is stored as it is")
        for module in self.declared.unquantized:
            if f"{module}.weight" in self.linears:
                raise CheckpointError(f"{says} {module} isn't quantized, and its tensors are quantized")
        for name, linear in self.linears.items():
            try:
                self._check_shape(linear)
                self._order(name)
                self.is_centred(name)
            except ValueError as error:
                raise CheckpointError(f"{self.folder}: {linear.module}: {error}") from None

    def _mismatches(self, shapes: Mapping[str, Shape], config: Glm4Config, encoding: Encoding | None) -> str | None:
        missing: list[str] = []
        wrong: list[str] = []
        for linear in self.linears.values():
            absent, differing, _ = self._problems(linear.module, linear.layout, linear.shape)
            missing += absent
            wrong += differing
        for name, stored in self.tensors.items():
            if expected_shape(name, config, encoding) is not None and stored.dtype not in FLOATS:
                wrong.append(f"mis-typed {name}: {_named(stored.dtype)}, expected {_listed(FLOATS)}")
        found = {name: shape for name, shape in shapes.items() if not self._is_empty_bias(name)}
        return mismatches(found, config, encoding, missing, wrong)

    def _unread(self) -> str:
        return self.stored._unread()

    def _reader(self, linear: Linear) -> ReadPart:
        return partial(_read_part, self.stored, linear.module)

    def _problems(self, module: str, layout: Layout, shape: Shape) -> tuple[list[str], list[str], list[str]]:
        """Lines about tensors that a linear lacks, about those that are others, and both together."""
        absent, differing = [], []
        for suffix, part in layout.parts(*shape).items():
            name = f"{module}.{suffix}"
            stored = self.stored.tensors.get(name)
            if stored is None:
                absent += [f"missing {name} {list(part.shape)}, of {layout}"] if part.needed else []
            elif stored.shape != part.shape:
                differing.append(f"mis-shaped {name}: {list(stored.shape)}, expected {list(part.shape)} of {layout}")
            elif stored.dtype not in part.dtypes:
                differing.append(f"mis-typed {name}: {_named(stored.dtype)}, expected {_listed(part.dtypes)}")
        return absent, differing, absent + differing

    def _is_empty_bias(self, name: str) -> bool:
        """A bias of zeros that no GLM-4 has: older GPTQ packages write one for every linear they quantize."""
        module, _, part = name.rpartition(".")
        linear = self.linears.get(f"{module}.weight")
        stored = self.tensors[name]
        if part != "bias" or linear is None or module.endswith(("q_proj", "k_proj", "v_proj")):
            return False
        return stored.shape == linear.shape[:1] and not self.stored.read(name, whole(stored.shape)).any()

    def _check_shape(self, linear: Linear) -> None:
        """``weight_shape``, where it is stored, holds the weight's."""
        name = f"{linear.module}.weight_shape"
        if name in self.stored.tensors and "weight_shape" in linear.layout.parts(*linear.shape):
            found = tuple(self.stored.read(name, whole((2,))).tolist())
            if found != linear.shape:
                raise ValueError(f"weight_shape is {list(found)}, expected {list(linear.shape)}")

    def _order(self, name: str) -> Tensor | None:
        """The group of each column, int64 [columns]; None where groups are in order."""
        if name not in self._orders:
            linear = self.linears[name]
            self._orders[name] = self._read_order(linear, linear.shape[1], linear.layout.group or linear.shape[1])
        return self._orders[name]

    def _read_order(self, linear: Linear, columns: int, group: int) -> Tensor | None:
        part = linear.layout.index
        if not part or f"{linear.module}.{part}" not in self.stored.tensors:
            return None
        order = self._reader(linear)(part, whole((columns,))).long()
        in_order = torch.arange(columns) // group
        if torch.equal(order, in_order) or (order == -1).all():  # -1: compressed-tensors' for none
            return None
        if int(order.min()) < 0 or int(order.max()) > int(in_order[-1]):
            raise ValueError(
                f"{part} has groups {int(order.min())} to {int(order.max())}; 0 to {int(in_order[-1])} exist"
            )
        return order

    def _is_positive(self, name: str) -> bool:
        """Whether every scale is above zero."""
        if name not in self._positive:
            linear = self.linears[name]
            rows, columns = linear.shape
            self._positive[name] = bool((linear.layout.scales(self._reader(linear), (0, rows), columns) > 0).all())
        return self._positive[name]


def _read_part(stored: Checkpoint, module: str, part: str, window: Window) -> Tensor:
    return stored.read(f"{module}.{part}", window)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(_named, dtypes))
