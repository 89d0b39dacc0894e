"""How quantized checkpoints lay out a linear [rows, columns]: which tensors stand for its weight, and what they mean.

Every layout is read as unsigned integers, or fp8, with scales and zero points of groups of columns. The layouts are
those of the packages that write them:

- GPTQ: ``pack_original`` in gptqmodel/nn_modules/qlinear/__init__.py (gptqmodel 7.7), ``pack`` in
  auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (auto-gptq 0.7).
- AWQ: ``WQLinear_GEMM.from_linear`` in awq/modules/linear/gemm.py and awq/utils/packing_utils.py (autoawq 0.2).
- compressed-tensors: compressed_tensors/compressors/pack_quantized and naive_quantized (compressed-tensors 0.20).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glm4export.weights.quantize import unpack
from glm4export.weights.tensors import Window, whole

Shape = tuple[int, ...]
ReadPart = Callable[[str, Window], Tensor]  # a window of one of a linear's tensors, by what it's called

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight columns lies


@dataclass(frozen=True)
class Part:
    """One of the tensors that stand for a weight."""

    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    needed: bool = True


class Layout(Protocol):
    """A way to store a quantized linear: ``(codes - zeros) * scales``, scales and zeros by group of columns."""

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: all of a row's."""
        ...

    @property
    def is_float(self) -> bool: ...

    @property
    def index(self) -> str:
        """What the tensor is called that gives each column's group; a linear without it has its groups in order."""
        ...

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        """The tensors that stand for a weight of that shape, by what is put behind the linear's name."""
        ...

    def zeros(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor | None:
        """Zero points of some rows, uint8 [rows, groups]; None: half the levels, and of floats 0."""
        ...

    def scales(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor:
        """Scales of some rows, float32 [rows, groups]."""
        ...

    def codes(self, read: ReadPart, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """uint8 below 2**bits, or float8_e4m3fn, [rows, columns]. Raises ValueError for integers out of range."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Gptq:
    """``qweight`` int32 [columns*bits/32, rows]: columns go into words, low bits first; ``qzeros`` [groups, rows*...].

    ``g_idx`` gives each column's group: with act-order the groups aren't in order.

    plus_one: format v1 stores zero points less one. For a zero point of 0 writers part: gptqmodel subtracts from whole
    words (``borrows``), so that it borrows from the next one, and adding to the word gives both back; others don't.
    """

    bits: int
    group: int | None
    plus_one: bool
    borrows: bool = False
    act_order: bool = False
    is_float = False
    index = "g_idx"

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        groups, per_word = _groups(columns, self.group), 32 // self.bits
        return {
            "qweight": Part((-(-columns // per_word), rows), (torch.int32,)),
            "qzeros": Part((groups, -(-rows // per_word)), (torch.int32,)),
            "scales": Part((groups, rows), FLOATS),
            "g_idx": Part((columns,), (torch.int32,), needed=self.act_order),
        }

    def zeros(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor | None:
        within, skip = _words(rows, self.bits)
        words = read("qzeros", ((0, _groups(columns, self.group)), within))
        if self.plus_one and not self.borrows and (unpacked(words, self.bits) == (1 << self.bits) - 1).any():
            raise ValueError(
                "zero points of 0 in checkpoint_format gptq, which writers pack in ways that contradict each other; "
                "save it as gptq_v2, or with gptqmodel"
            )
        if self.plus_one:
            words = words + sum(1 << shift for shift in range(0, 32, self.bits))
        return _along(unpacked(words, self.bits), skip, rows).T

    def scales(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor:
        return read("scales", ((0, _groups(columns, self.group)), rows)).float().T

    def codes(self, read: ReadPart, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        words, skip = _words(columns, self.bits)
        return _along(unpacked(read("qweight", (words, rows)).T, self.bits), skip, columns)

    def __str__(self) -> str:
        return f"GPTQ int{self.bits} {_by(self.group)}"


@dataclass(frozen=True)
class AwqGemm:
    """``qweight`` int32 [columns, rows/8]: rows go into words in an order of their own, and so do zero points."""

    group: int | None
    bits = 4
    is_float = False
    index = ""

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        groups = _groups(columns, self.group)
        return {
            "qweight": Part((columns, -(-rows // 8)), (torch.int32,)),
            "qzeros": Part((groups, -(-rows // 8)), (torch.int32,)),
            "scales": Part((groups, rows), FLOATS),
        }

    def zeros(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor | None:
        return self._unpacked(read, "qzeros", rows, (0, _groups(columns, self.group)))

    def scales(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor:
        return read("scales", ((0, _groups(columns, self.group)), rows)).float().T

    def codes(self, read: ReadPart, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        return self._unpacked(read, "qweight", rows, columns)

    def _unpacked(self, read: ReadPart, part: str, rows: tuple[int, int], height: tuple[int, int]) -> Tensor:
        words, skip = _words(rows, 4)
        values = unpacked(read(part, (height, words)), 4)
        values = values.view(len(values), -1, 8)[..., list(_AWQ_ORDER)].flatten(1)
        return _along(values, skip, rows).T

    def __str__(self) -> str:
        return f"AWQ int4 {_by(self.group)}"


@dataclass(frozen=True)
class Compressed:
    """compressed-tensors: ``weight_packed`` int32 [rows, columns*bits/32], or ``weight`` int8 or fp8 [rows, columns].

    Packed integers are unsigned, with half the levels added; int8 is signed. A scale is a group's, a row's or, with
    ``per_tensor``, the whole matrix's. ``activations``: scales of inputs may lie beside it, which nobody reads.
    """

    bits: int
    group: int | None
    symmetric: bool
    packed: bool
    is_float: bool = False
    per_tensor: bool = False
    activations: bool = False
    act_order: bool = False
    index = "weight_g_idx"

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        scales = (1,) if self.per_tensor else (rows, _groups(columns, self.group))
        parts = {"weight_scale": Part(scales, FLOATS)}
        if self.packed:
            parts["weight_packed"] = Part((rows, -(-columns * self.bits // 32)), (torch.int32,))
            parts["weight_shape"] = Part((2,), (torch.int64, torch.int32))
            parts["weight_g_idx"] = Part((columns,), (torch.int32, torch.int64), needed=self.act_order)
        else:
            parts["weight"] = Part((rows, columns), (torch.float8_e4m3fn if self.is_float else torch.int8,))
        if not self.symmetric:
            packed_rows = (-(-rows * self.bits // 32), *scales[1:])
            grouped = self.packed and not self.per_tensor
            parts["weight_zero_point"] = Part(packed_rows, (torch.int32,)) if grouped else Part(scales, (torch.int8,))
        if self.activations:
            parts |= {name: Part((1,), (*FLOATS, torch.int8), needed=False) for name in _OF_INPUTS}
        return parts

    def zeros(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor | None:
        if self.symmetric:
            return None
        if not self.packed or self.per_tensor:
            return self._unsigned(self._by_rows(read, "weight_zero_point", rows, columns))
        words, skip = _words(rows, self.bits)
        packed = read("weight_zero_point", (words, (0, _groups(columns, self.group))))
        return _along(unpacked(packed.T, self.bits), skip, rows).T

    def scales(self, read: ReadPart, rows: tuple[int, int], columns: int) -> Tensor:
        return self._by_rows(read, "weight_scale", rows, columns).float()

    def codes(self, read: ReadPart, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        if self.packed:
            words, skip = _words(columns, self.bits)
            return _along(unpacked(read("weight_packed", (rows, words)), self.bits), skip, columns)
        values = read("weight", (rows, columns))
        return values if self.is_float else self._unsigned(values)

    def _by_rows(self, read: ReadPart, part: str, rows: tuple[int, int], columns: int) -> Tensor:
        if self.per_tensor:
            return read(part, whole((1,))).expand(rows[1] - rows[0], 1)
        return read(part, (rows, (0, _groups(columns, self.group))))

    def _unsigned(self, values: Tensor) -> Tensor:
        half = 1 << (self.bits - 1)
        if self.bits < 8 and (int(values.min()) < -half or int(values.max()) >= half):
            raise ValueError(f"integers of {self.bits} bits are not in {-half}..{half - 1}")
        return (values.to(torch.int16) + half).to(torch.uint8)

    def __str__(self) -> str:
        kind = "fp8" if self.is_float else f"int{self.bits}"
        return f"compressed-tensors {kind} {'with one scale' if self.per_tensor else _by(self.group)}"


_OF_INPUTS = ("input_scale", "input_zero_point")


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 words [n, m] as uint8 values [n, m * 32 / bits], a word's low bits first."""
    # a copy: a single column may be contiguous with any stride, and view wants 1
    whole_words = words.clone(memory_format=torch.contiguous_format)
    return unpack(whole_words.view(torch.uint8), bits, words.shape[1] * 32 // bits)


def _words(values: tuple[int, int], bits: int) -> tuple[tuple[int, int], int]:
    """Start and stop of the words that hold some values, and how many others come first in them."""
    per_word = 32 // bits
    first = values[0] // per_word
    return (first, -(-values[1] // per_word)), values[0] - first * per_word


def _along(values: Tensor, skip: int, wanted: tuple[int, int]) -> Tensor:
    """Columns of unpacked words, ``skip`` values in."""
    return values[:, skip : skip + wanted[1] - wanted[0]]


def _groups(columns: int, group: int | None) -> int:
    return 1 if group is None else -(-columns // group)


def _by(group: int | None) -> str:
    return "by rows" if group is None else f"in groups of {group}"
