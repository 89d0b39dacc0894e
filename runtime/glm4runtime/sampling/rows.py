"""What all of this room does with a row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm4runtime.contract import UserError, shown

Row = NDArray[np.float32]  # [vocab]
Ids = NDArray[np.int64]

_BLOCK = 128


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


def largest(row: Row, count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` largest numbers, descending; of equal ones the lowest ids, and these ascending.

    The ``count`` largest maxima of blocks bound them from below, so most blocks are never looked into.
    """
    whole = len(row) // _BLOCK * _BLOCK
    maxima = row[:whole].reshape(-1, _BLOCK).max(axis=1)
    if count < len(maxima):
        bound = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        blocks = np.flatnonzero(maxima >= bound)
        within, offsets = np.nonzero(row[:whole].reshape(-1, _BLOCK)[blocks] >= bound)
        rest = whole + np.flatnonzero(row[whole:] >= bound)
        ids = np.concatenate([blocks[within] * _BLOCK + offsets, rest])
    else:
        ids = np.arange(len(row))
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
