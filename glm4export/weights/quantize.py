"""Block-wise 4- and 8-bit weights, in the layouts that ONNX Runtime's kernels read.

A block of consecutive columns shares one scale ``s`` and one integer zero point ``z``: ``w ~ s * (q - z)``. Scales are
searched for the least ``sum(importance * (w - s * (q - z))**2)``, not taken from the largest weight:

1. The block is normalised so that its largest magnitude lies on the end of the integer range that has one more level
   (-8 of -8..7): the scale may be negative, as in llama.cpp's Q4_0. An asymmetric block gives each side the levels
   that it needs.
2. A few scales around that one are tried. For given integers ``u = q - z`` the best scale is ``sum(iwu) / sum(iuu)``,
   and leaves an error of ``sum(iww) - sum(iwu)**2 / sum(iuu)`` (weighted least squares, as make_qx_quants does in
   llama.cpp's ggml-quants.c). The best is rounded and fitted once more.
3. The scale is rounded to the dtype it is stored in, and the integers are chosen for the rounded scale.

With eight candidates the error is within 0.5% of an exhaustive search's on normal, Laplace and Student's t weights.

Only exactly rounded element-wise operations are used, never a library's sum, whose order depends on shapes: a row's
result doesn't depend on the rows around it, on windows, or on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from glm4export.weights.widths import BLOCKS
from glm4runtime.contract import UserError

E4M3_MAX = 448.0  # OCP 8-bit floating point: 4 bits of exponent, 3 of significand, no infinity
CHUNK_ELEMENTS = 1 << 19  # weights that a thread works on at once: a few 2 MiB buffers, which stay in cache

# Candidate scales, as factors on the inverse of the absmax scale: above 1 the largest weight is clipped.
_FACTORS_4 = (0.89, 0.93, 0.96, 1.0, 1.05, 1.1, 1.175, 1.275)
_FACTORS_8 = (1.0,)  # 256 levels for at most 128 weights: clipping never pays
_FACTORS_ROWS = (1.0, 1.12, 1.3, 1.55, 1.9, 2.4)  # a whole row has larger outliers


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized along its columns, and the dtype that its scales are stored in.

    positive: scales are above zero, as TensorRT takes them; else a symmetric block's may be negative.
    """

    bits: int
    block: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    positive: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits} is not 4 or 8")
        if self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two of at least 16")
        if self.positive and not self.symmetric:
            raise ValueError("positive scales go with symmetric blocks, which have no zero point")

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"int{self.bits} block {self.block} {kind}{', positive' if self.positive else ''}"


@dataclass
class Quantized:
    """A matrix [rows, columns] as com.microsoft::MatMulNBits stores it.

    data: uint8 [rows, columns/block, block*bits/8]; 4 bits go two to a byte, the first in the low half.
    scales: float32 [rows, columns/block], holding values of the scheme's scale dtype; they may be negative.
    zero_points: None (8 for 4 bits, 128 for 8), or uint8 [rows, ceil(columns/block*bits/8)], packed as data.

    com.microsoft::GatherBlockQuantized stores the same bytes: ``data.flatten(1)``, uint8 [rows, columns*bits/8], with
    the same scales and zero points.
    """

    data: Tensor
    scales: Tensor
    zero_points: Tensor | None


def block_for(columns: int, preferred: int = 128) -> int:
    """The block size for that many columns: ``preferred`` where it divides them, else the largest below that does.

    Raises UserError where none does.
    """
    for block in (preferred, *(size for size in BLOCKS if size < preferred)):
        if columns % block == 0:
            return block
    raise UserError(
        f"a weight of {columns} columns can't be quantized: that is no multiple of {BLOCKS[-1]}, the smallest block; "
        "use --precision fp16 or fp32"
    )


def quantize(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Quantize a float matrix [rows, columns], minimising ``sum(importance * error**2)`` block by block.

    importance: non-negative [columns], such as the second moment of each input channel; None weighs all alike.
    Rows are independent of each other. Raises ValueError for weights or scales that aren't finite.
    """
    rows, columns = weight.shape
    if columns % scheme.block:
        raise ValueError(f"{columns} columns are no multiple of the block size {scheme.block}")
    blocks, levels = columns // scheme.block, 2**scheme.bits
    per_byte = 8 // scheme.bits
    data = torch.empty(rows, blocks, scheme.block // per_byte, dtype=torch.uint8)
    scales = torch.empty(rows, blocks)
    zero_points = torch.empty(rows, blocks, dtype=torch.uint8)

    def work(search: _Search, first: int, last: int) -> None:
        count = (last - first) * blocks
        search.load(weight[first:last].reshape(count, scheme.block))
        search.normalise(levels, scheme.symmetric, positive=scheme.positive)
        scales[first:last] = search.fit(scheme.scale_dtype).view(-1, blocks)
        zero_points[first:last] = search.low.neg().view(-1, blocks)
        q = search.levels_used().sub_(search.low)  # 0 .. levels-1
        if per_byte == 2:
            q = q[1::2].mul_(16).add_(q[0::2])
        data[first:last] = q.to(torch.uint8).T.reshape(-1, blocks, scheme.block // per_byte)

    factors = _FACTORS_4 if scheme.bits == 4 else _FACTORS_8
    _by_chunks(weight, scheme.block, factors, importance, work)
    return Quantized(data, scales, None if scheme.symmetric else pack(zero_points, scheme.bits))


def quantize_rows(
    weight: Tensor,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Quantize with one scale per row, above zero: int8 [rows, columns] and float32 [rows], with ``w ~ scale * q``.

    q is in -127..127.
    """
    rows, columns = weight.shape
    data, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)

    def work(search: _Search, first: int, last: int) -> None:
        search.load(weight[first:last])
        search.normalise(2 * 127 + 1, symmetric=True, positive=True)  # as many levels on either side
        scales[first:last] = search.fit(scale_dtype)
        data[first:last] = search.levels_used().to(torch.int8).T

    _by_chunks(weight, columns, _FACTORS_ROWS, None, work)
    return data, scales


def quantize_rows_fp8(weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Round to fp8 with one scale per row, above zero: float8_e4m3fn [rows, columns] and float32 [rows].

    Each row's largest magnitude becomes E4M3's, 448. Raises ValueError for weights that aren't finite.
    """
    reach = weight.float().abs().amax(1)
    if not reach.isfinite().all():
        raise ValueError("a weight is not finite")
    scales = (reach / E4M3_MAX).to(scale_dtype).float()
    scales[scales == 0] = 1  # a row of zeros, whatever its scale
    ratios = (weight.float() / scales[:, None]).clamp_(-E4M3_MAX, E4M3_MAX)  # beyond it, torch makes NaN
    return ratios.to(torch.float8_e4m3fn), scales


def signed(data: Tensor, scheme: Scheme) -> Tensor:
    """A symmetric matrix's packed data [rows, blocks, bytes] as int8 [rows, columns], zero at 0."""
    values = unpack(data.flatten(1), scheme.bits, data.shape[1] * scheme.block)
    return values.view(torch.int8) - 8 if scheme.bits == 4 else (values ^ 128).view(torch.int8)


def pack_signed(values: Tensor) -> Tensor:
    """int8 values of -8 to 7, an even number of them, as ONNX's INT4: two to a byte, the first in the low half."""
    return pack(values.flatten().view(torch.uint8)[None] & 15, 4)[0]


def joined(parts: Sequence[Quantized]) -> Quantized:
    """The rows of one part after those of another."""
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return Quantized(
        torch.cat([part.data for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zero_points) if zero_points else None,
    )


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 [rows, n], each below 2**bits, into uint8 [rows, ceil(n*bits/8)], low bits first."""
    if bits == 8:
        return values
    padded = torch.nn.functional.pad(values, (0, values.shape[1] % 2))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [rows, count]."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :count]


class _Search:
    """The search over many blocks at once, in buffers that are reused.

    Blocks lie along the columns: [block, count]. So per-block values broadcast along contiguous memory, and sums over a
    block are a few additions of long rows in a fixed order.
    """

    def __init__(self, block: int, count: int, factors: Sequence[float], importance: Tensor | None) -> None:
        self.factors = factors
        self.weight, self.used, self.scratch = (torch.empty(block, count) for _ in range(3))
        self.halves, size = [], block
        while size > 1:
            half = (size + 1) // 2
            self.halves.append((self.scratch[: size - half], self.scratch[half:size]))
            size = half
        self.importance = self.weighted = None
        if importance is not None:
            per_block = importance.float().view(-1, block).T  # [block, blocks of a row]
            self.importance = per_block.repeat(1, count // per_block.shape[1])
            self.weighted = torch.empty(block, count)

    def load(self, weight: Tensor) -> None:
        """Take the blocks [count, block]."""
        self.weight.copy_(weight.float().T)  # one dtype: a plain transposing copy is twice as fast

    def normalise(self, levels: int, symmetric: bool, *, positive: bool) -> None:
        """Scale each block by ``1 / unit``, so that rounding it as it is would be absmax quantization."""
        high, low = self.weight.amax(0), self.weight.amin(0)
        if not (high.isfinite().all() and low.isfinite().all()):
            raise ValueError("a weight is not finite")
        extreme = torch.where(high > -low, high, low)  # the largest magnitude, with its sign
        ends = torch.full_like(high, levels // 2)  # how many levels the extreme is away from zero
        if not symmetric:
            other_side = torch.where(high > -low, -low, high).clamp_(min=0)
            ends = ((levels - 1) / (other_side / extreme.abs() + 1)).nan_to_num_(nan=levels // 2)
        if positive:
            ends = torch.where(extreme > 0, (levels - 1) // 2, ends)
            extreme = -extreme.abs()
        below = torch.full_like(high, levels // 2) if symmetric else ends.round()
        self.unit = -extreme / ends  # the absmax scale
        inverse = -ends / extreme
        self.positive = positive
        self.weight.mul_(torch.where(inverse.isfinite(), inverse, 0))  # blocks below 1e-37 count as zero
        self.low: Tensor = -below
        self.bounds = (-(levels // 2), (levels - 1) // 2) if symmetric else (-below, levels - 1 - below)
        if self.importance is not None and self.weighted is not None:
            torch.mul(self.weight, self.importance, out=self.weighted)

    def fit(self, scale_dtype: torch.dtype) -> Tensor:
        """The best scale of each block, float32 [count], rounded to ``scale_dtype``."""
        best, scale = torch.zeros_like(self.unit), torch.ones_like(self.unit)
        for factor in self.factors:
            self._try(factor, best, scale)
        self._try(1 / scale, best, scale)
        self.scale = (scale * self.unit).to(scale_dtype).float()
        if self.positive:
            self.scale[self.scale == 0] = 1  # a block of zeros, whatever its scale
        if not self.scale.isfinite().all():
            raise ValueError(f"a scale is beyond {scale_dtype}'s range")
        return self.scale

    def levels_used(self) -> Tensor:
        """The integers for the fitted scales, as float32 [block, count]; valid until the next load."""
        ratio = self.unit / self.scale
        self._round(torch.where(ratio.isfinite(), ratio, 0))
        return self.used

    def _round(self, inverse: float | Tensor) -> None:
        torch.mul(self.weight, inverse, out=self.used).round_().clamp_(*self.bounds)

    def _try(self, inverse: float | Tensor, best: Tensor, scale: Tensor) -> None:
        """Round with that inverse scale; keep the least-squares scale of the blocks where it beats ``best``."""
        self._round(inverse)
        wu = self._sum(self.used, self.weight if self.weighted is None else self.weighted)
        uu = self._sum(self.used, self.used, self.importance)
        fitted = wu / uu
        score = wu * fitted
        better = score > best  # false where uu is 0
        best.copy_(torch.where(better, score, best))
        scale.copy_(torch.where(better, fitted, scale))

    def _sum(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        torch.mul(a, b, out=self.scratch)
        if c is not None:
            self.scratch.mul_(c)
        for into, half in self.halves:
            into.add_(half)
        return self.scratch[0].clone()


def _by_chunks(
    weight: Tensor,
    block: int,
    factors: Sequence[float],
    importance: Tensor | None,
    work: Callable[[_Search, int, int], None],
) -> None:
    """Call ``work`` on chunks of rows, on as many threads as torch would use."""
    rows, columns = weight.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    starts = range(0, rows, step)
    threads = min(torch.get_num_threads(), len(starts))

    def every(thread: int) -> None:
        search = None
        for first in starts[thread::threads]:
            last = min(first + step, rows)
            if search is None or last - first < step:
                search = _Search(block, (last - first) * columns // block, factors, importance)
            work(search, first, last)

    in_threads(every, threads)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, each on its own thread, and every torch operation on that thread only.

    For many short operations: torch's threads meet after each, and wait for whichever another process holds up.
    """

    def alone(index: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            work(index)

    before = torch.get_num_threads()
    try:
        if count == 1:
            alone(0)
        elif count:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(alone, range(count)))
    finally:
        torch.set_num_threads(before)  # of this thread, and of those started from now on
