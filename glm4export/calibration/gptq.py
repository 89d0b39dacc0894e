"""GPTQ: a weight quantized with an eye on its inputs (Frantar et al., 2022, https://arxiv.org/abs/2210.17323).

Rounding a column of a weight leaves an error in the layer's output; the columns after it can take most of it back, as
far as their inputs correlate. With ``H = XᵀX`` over calibration inputs X and ``H⁻¹ = UᵀU``, U upper triangular, the
error ``e = (w_j - ŵ_j) / U_jj`` of column j is taken from the columns behind it as ``e * U_jk``. Scales are searched
block by block (:func:`glm4export.weights.quantize.quantize`) on the weights as they are by then, weighed by ``1 /
U_jj²``: what an error costs that the columns behind can't mend.

H of all columns of a ``down_proj`` would take 750 MB at GLM-4-9B's geometry and 2.1 GB at 32B's, and its factorisation
as much again. Columns compensate each other in groups of at most ``MAX_GROUP`` instead; no error crosses from one group
to the next. (So only ``down_proj`` is cut at 9B, in four. On the embedded model, int4 in blocks of 32, mean KL was
2.82e-3 plain, 2.39e-3 with whole linears and 2.45e-3 with ``down_proj`` in two groups of 256.) Rows are independent of
each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from glm4export.weights.quantize import Quantized, Scheme, in_threads, joined, pack, quantize, unpack

MAX_GROUP = 4096  # columns: bounds the memory of H, and the time, which is cubic
MAX_BYTES = 1 << 28  # of U of all groups of one linear: at 32B, down_proj's groups are 2560 columns
DAMPING = 0.1  # added to H's diagonal, relative to its mean: less trust in few tokens' correlations


@dataclass(frozen=True)
class Compensation:
    """How columns start to stop of a linear make up for each other: U, float32 [stop - start, stop - start]."""

    start: int
    upper: Tensor


def compensations(
    inputs: Tensor, block: int, *, max_group: int = MAX_GROUP, damping: float = DAMPING
) -> list[Compensation]:
    """From a linear's inputs [tokens, in]: U of each group of columns, groups being a whole number of blocks."""
    columns = inputs.shape[1]
    max_group = min(max_group, MAX_BYTES // (4 * columns))
    found = []
    for start, stop in _cut(columns, block, max_group):
        # H = V Vᵀ with V upper triangular is a Cholesky factorisation of the columns in reverse; then U = V⁻¹.
        x = inputs[:, start:stop].flip(1)
        lower = torch.linalg.cholesky(_hessian(x, damping))
        del x
        inverse = torch.linalg.solve_triangular(lower, torch.eye(stop - start), upper=False)
        del lower
        found.append(Compensation(start, inverse.flip(0, 1)))
    return found


def _hessian(inputs: Tensor, damping: float) -> Tensor:
    """``XᵀX``, positive definite by its damping."""
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(damping * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return hessian


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
    q, errors, used = torch.empty_like(work, dtype=torch.uint8), torch.empty(block, rows), torch.empty(rows)
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
                pivot, error = part.upper[first + column], errors[column]
                torch.mul(own[column], inverse, out=used).round_().add_(zero_points[at]).clamp_(0, levels - 1)
                q[part.start + first + column] = used
                torch.sub(used, zero_points[at], out=error).mul_(scales[at])
                torch.sub(own[column], error, out=error).div_(pivot[first + column])
                own[column + 1 :].addr_(pivot[first + column + 1 : last], error, alpha=-1)
            rest[last:].addmm_(part.upper[first:last, last:].T, errors, alpha=-1)
    data = pack(q.T, scheme.bits).view(rows, columns // block, -1)
    packed = None if scheme.symmetric else pack(zero_points.to(torch.uint8).T, scheme.bits)
    return Quantized(data, scales.T.contiguous(), packed)


def _cut(columns: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut columns into few groups of about equal size, each a whole number of blocks and at most ``most``."""
    blocks = columns // block
    count = math.ceil(columns / max(block, most // block * block))
    edges = [blocks * index // count * block for index in range(count + 1)]
    return pairwise(edges)
