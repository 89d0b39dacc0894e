"""From one row of logits to one token id: greedy, temperature, top-k, top-p.

The order and the meaning of the steps are those of Hugging Face's ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and
``TopPLogitsWarper``. GLM-4's vocabulary has 151552 entries, so nothing here sorts all of it where less will do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm4runtime.contract import UserError

__all__ = ["Sampler", "SamplingParams"]

# Relative to the most probable token. A trained model's nucleus nearly always lies above the first or the second floor;
# the third floor that `_nucleus` tries is one below which no token can belong to the nucleus.
_FLOORS = (1e-2, 1e-4)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token, and when to stop choosing.

    Raises:
        UserError: a field is of the wrong type, not finite, or out of its range.
    """

    temperature: float = 0.0  # 0: greedy, and then top_k, top_p and seed have no effect
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off; 0 keeps the most probable token alone
    seed: int | None = None  # None: fresh entropy from the operating system
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, "a finite number >= 0", low=0)
        _check("top_k", self.top_k, Integral, "an integer >= 0 (0 turns it off)", low=0)
        _check("top_p", self.top_p, Real, "a number from 0 to 1 (1 turns it off)", low=0, high=1)
        if self.seed is not None:
            _check("seed", self.seed, Integral, "an integer >= 0, or None for a fresh one", low=0)
        _check("max_new_tokens", self.max_new_tokens, Integral, "an integer >= 1", low=1)


def _check(field: str, value: Any, kind: type, expected: str, low: float, high: float = math.inf) -> None:
    # bool is an int to Python, but `top_k=True` is a mistake. NaN fails both comparisons.
    good_kind = isinstance(value, kind) and not isinstance(value, bool)
    if not good_kind or not low <= value <= high or value == math.inf:
        raise UserError(f"{field}: expected {expected}, found {value!r}")


class Sampler:
    """Draws token ids from logits. Build it once, before the loop: it owns its scratch memory and its random stream.

    The same parameters, seed and logits give the same tokens. One sampler serves one sequence at a time.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self._greedy = params.temperature == 0
        # Within float32, so that neither 0/0 nor inf/inf can come of an extreme temperature.
        limits = np.finfo(np.float32)
        self._temperature = np.float32(min(max(params.temperature, float(limits.tiny)), float(limits.max)))
        self._top_k = int(params.top_k) if 0 < params.top_k < vocab_size else 0
        self._top_p = float(params.top_p)
        self._random = np.random.Generator(np.random.PCG64(None if params.seed is None else int(params.seed)))
        size = 0 if self._greedy else vocab_size
        self._scratch: NDArray[np.float32] = np.empty(size, np.float32)
        self._weights: NDArray[np.float32] = np.empty(size, np.float32)
        self._cumulative: NDArray[np.float64] = np.empty(size, np.float64)
        self._mask: NDArray[np.bool_] = np.empty(size, np.bool_)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Choose one token id.

        Args:
            logits: float32 [vocab_size]; read only. ``-inf`` forbids a token.

        Raises:
            UserError: the largest logit is NaN or infinite, so there is no distribution to draw from.
            ValueError: the array is not float32 [vocab_size].
        """
        if logits.shape != (self.vocab_size,) or logits.dtype != np.float32:
            raise ValueError(f"logits: expected float32 [{self.vocab_size}], found {logits.dtype} {list(logits.shape)}")
        best = int(logits.argmax())  # the lowest id wins a tie; a NaN wins over everything
        top = logits[best]
        if not np.isfinite(top):
            raise UserError(
                f"logits: expected a finite maximum, found {top} at token {best}; "
                "the model's activations overflowed: build it with a wider precision"
            )
        if self._greedy:
            return best
        ids, weights = self._kept(logits, top)
        drawn = self._draw(weights)
        return drawn if ids is None else int(ids[drawn])

    def state(self) -> Any:
        """What :meth:`restore` takes: where the random stream is."""
        return None if self._greedy else self._random.bit_generator.state

    def restore(self, state: Any) -> None:
        """Go back to where the random stream was."""
        if not self._greedy:
            self._random.bit_generator.state = state

    def _kept(
        self, logits: NDArray[np.float32], top: np.float32
    ) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
        """Ids that top_k and top_p leave, ascending (None: all), and their unnormalised probabilities, the largest 1.

        The weights may lie in scratch memory, good until the next step. ``top`` is the largest logit.
        """
        ids = self._largest(logits) if self._top_k else None
        scores = logits if ids is None else logits[ids]
        weights = self._weights[: scores.size]
        # Subtracting the maximum first makes the largest exponent 0, so nothing overflows but towards exp(-inf) = 0.
        with np.errstate(over="ignore", under="ignore"):
            np.subtract(scores, top, out=weights)
            np.divide(weights, self._temperature, out=weights)
            np.exp(weights, out=weights)
        if self._top_p < 1:
            kept = self._nucleus(weights)
            ids = kept if ids is None else ids[kept]
            weights = weights[kept]
        return ids, weights

    def _largest(self, logits: NDArray[np.float32]) -> NDArray[np.intp]:
        """Ids, ascending, of the top_k largest logits and of all that tie with the last of these."""
        # Partitioning a copy of the values beats argpartition, which moves (and allocates) 8-byte indices.
        np.copyto(self._scratch, logits)
        self._scratch.partition(self.vocab_size - self._top_k)
        np.greater_equal(logits, self._scratch[self.vocab_size - self._top_k], out=self._mask)
        return np.flatnonzero(self._mask)

    def _nucleus(self, weights: NDArray[np.float32]) -> NDArray[np.intp]:
        """Positions, ascending, of the fewest largest weights whose sum reaches top_p of the whole; at least one.

        Args:
            weights: float32 [n], unnormalised probabilities of which the largest is 1.
        """
        total = float(weights.sum(dtype=np.float64))
        target = self._top_p * total
        # All tokens below this together weigh less than (1 - top_p) * total: none of them is in the nucleus.
        safe_floor = (1 - self._top_p) * total / weights.size
        for floor in (*(f for f in _FLOORS if f > safe_floor), min(safe_floor, 1.0)):
            mask = np.greater_equal(weights, np.float32(floor), out=self._mask[: weights.size])
            candidates = np.flatnonzero(mask)
            values = np.take(weights, candidates, out=self._scratch[: candidates.size], mode="clip")
            if float(values.sum(dtype=np.float64)) >= target:
                break
        chosen = weights[candidates]
        values.sort()
        descending = values[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64, out=self._cumulative[: values.size])
        count = min(int(np.searchsorted(cumulative, target)) + 1, values.size)
        # Of the tokens that tie with the last one in, the lowest ids stay.
        last = descending[count - 1]
        keep = chosen > last
        ties = np.flatnonzero(chosen == last)
        keep[ties[: count - int(np.count_nonzero(keep))]] = True
        kept: NDArray[np.intp] = candidates[keep]
        return kept

    def _draw(self, weights: NDArray[np.float32]) -> int:
        """A position drawn with probability proportional to its weight."""
        cumulative = np.cumsum(weights, dtype=np.float64, out=self._cumulative[: weights.size])
        total = cumulative[-1]
        # side="right" passes over weights of zero. Rounding may carry the product up to the total itself: then the
        # last position whose weight isn't zero is meant.
        drawn = np.searchsorted(cumulative, self._random.random() * total, side="right")
        return int(min(drawn, np.searchsorted(cumulative, total)))
