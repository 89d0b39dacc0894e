"""How probable the model finds tokens, before temperature, penalties and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm4runtime.sampling.rows import Row, largest, most_probable, token_ids

_CHUNK = 16384  # logits at a time: what is computed of them stays in the cache


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log-probability, and the most probable tokens of its place. Natural logarithms."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), descending; ties by the lowest id


def log_probabilities(
    logits: NDArray[np.float32], tokens: Sequence[int] | NDArray[np.int64], top: int
) -> list[TokenLogprobs]:
    """What the model makes of tokens, and of the ``top`` most probable ones beside.

    Args:
        logits: float32 [n, vocab], a row for each token; read only. The softmax is over the whole row, in float64.
        tokens: n token ids.
        top: how many alternatives, 0 or more; as many as there are at most.

    Raises:
        UserError: a row's largest logit is NaN or infinite, or a token isn't of the vocabulary.
        ValueError: there aren't as many rows as tokens.
    """
    if logits.ndim != 2 or len(logits) != len(tokens):
        raise ValueError(f"logits: expected [{len(tokens)}, vocab], a row for each token, found {list(logits.shape)}")
    ids = token_ids("tokens", tokens, logits.shape[1]).tolist()
    return [_token_logprobs(row, token, top) for row, token in zip(logits, ids, strict=True)]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of every token, float32 [n, vocab] of logits of that shape. Raises UserError as above."""
    return np.stack([row - np.float32(_log_sum_exp(row)) for row in logits])


def _token_logprobs(row: Row, token: int, top: int) -> TokenLogprobs:
    total = _log_sum_exp(row)
    ids = largest(row, top) if top else ()
    return TokenLogprobs(token, float(row[token]) - total, tuple((int(i), float(row[i]) - total) for i in ids))


def _log_sum_exp(row: Row) -> float:
    most = row[most_probable(row)]
    with np.errstate(over="ignore", under="ignore"):
        chunks = (row[at : at + _CHUNK] - most for at in range(0, len(row), _CHUNK))
        total = sum(float(np.exp(chunk, out=chunk).sum(dtype=np.float64)) for chunk in chunks)
    return float(most) + math.log(total)
