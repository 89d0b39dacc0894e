"""Token ids that a user gives, checked before a graph sees them: an embedding looked up out of range is no error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from glm4runtime.contract import UserError


def checked_ids(tokens: Any, vocab_size: int, what: str = "the prompt") -> np.ndarray:
    """int64 [n]. Raises UserError, about ``what``, unless it's at least one token id of the vocabulary, in a row."""
    sized = isinstance(tokens, Sequence | np.ndarray) and not isinstance(tokens, str | bytes | bytearray)
    if not sized:
        raise UserError(f"{what} is {tokens!r:.80}, expected a sequence of token ids")
    if not len(tokens):
        raise UserError(f"{what} is empty; at least one token is needed")
    if isinstance(tokens, np.ndarray) and tokens.ndim == 1 and tokens.dtype.kind in "iu":
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][:1].tolist()
    else:
        bad = [token for token in tokens if not is_id(token, vocab_size)][:1]
    if bad:
        raise UserError(
            f"{what}: token id {bad[0]!r:.80} is not a whole number in 0..{vocab_size - 1}, the model's vocabulary"
        )
    return np.asarray(tokens, dtype=np.int64)


def is_id(token: Any, vocab_size: int) -> bool:
    """Whether that's a token id; bool is an int to Python, but True is none."""
    return isinstance(token, int | np.integer) and not isinstance(token, bool) and bool(0 <= token < vocab_size)
