"""What all of this room does with a row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm4runtime.contract import UserError, shown

Row = NDArray[np.float32]  # [vocab]
Ids = NDArray[np.int64]

_PARTS = 1024


def most_probable(logits: Row) -> int:
    """The id of the largest logit; the lowest id wins a tie.

    Raises UserError where that logit is NaN or infinite, so that there is no distribution.
    """
    best = int(logits.argmax())  # a NaN wins over everything
    top = logits[best]
    if not np.isfinite(top):
        raise UserError(
            f"logits: expected a finite maximum, found {top} at token {best}; "
            "the model's activations overflowed: build it with a wider precision"
        )
    return best


def kth_largest(row: Row, count: int) -> np.float32:
    """The number that ``count`` numbers of the row reach, 1 to all of them, and fewer exceed.

    Parts of the row have a largest number each. The ``count``-th largest of these bounds what is sought from below, so
    fewer than ``count`` parts need to be looked into; a whole row of equal numbers would take a partition 20 ms.
    """
    parts = row[: len(row) // _PARTS * _PARTS].reshape(-1, _PARTS)  # the columns: their maxima are the faster ones
    if count < _PARTS <= len(row):
        maxima = parts.max(axis=0)
        bound: np.float32 = np.partition(maxima, _PARTS - count)[_PARTS - count]
        above = np.concatenate([parts[:, maxima > bound].reshape(-1), row[parts.size :]])
        row = above[above > bound]
        if len(row) < count:
            return bound
    found: np.float32 = np.partition(row, len(row) - count)[len(row) - count]
    return found


def largest(row: Row, count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` largest numbers, descending; of equal ones the lowest ids, and these ascending."""
    count = min(count, len(row))
    ids = np.flatnonzero(row >= kth_largest(row, count))
    # Stable: ids ascend, and so do those of equal numbers.
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def token_ids(name: str, ids: Sequence[int] | NDArray[np.integer[Any]], vocab_size: int) -> Ids:
    """Ids as an array. Raises UserError for one outside the vocabulary."""
    if isinstance(ids, np.ndarray):
        outside = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    else:
        outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"{name}: expected token ids in 0..{vocab_size - 1}, found {shown(outside[0])}")
    return np.asarray(ids, np.int64)
