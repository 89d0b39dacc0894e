"""Filters: temperature, and which tokens are left to draw from.

Tokens are given by weights, unnormalised probabilities of which the largest is 1. A cut takes them and returns the
positions that stay, ascending. GLM-4's vocabulary has 151552 entries, so nothing here sorts all of it where less will
do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from glm4runtime.backends.held_row import HeldRow
from glm4runtime.sampling.params import SamplingParams
from glm4runtime.sampling.rows import Row

Weights = NDArray[np.float32]  # [n]
Positions = NDArray[np.intp]

# Relative to the most probable token. A trained model's nucleus nearly always lies above the first or the second floor;
# the third floor that `_nucleus` tries is one below which no token can belong to the nucleus.
_FLOORS = (1e-2, 1e-4)
_REACHES = (2.0, 8.0)  # nats from typical surprise where is looked first; few tokens of a trained model are so near
_FEW = 4096  # that are sorted without more ado
_ROUNDING = 1e-4  # how far a device's float32 sum of a row's exponentials may be off, as a share; they differ by 1e-6
_LEAST_LOG = np.float32(-104.0)  # below the logarithm of the smallest float32


class Filters:
    """Temperature, top-k, top-p, min-p, typical and XTC, in this order; scratch memory is allocated here, once.

    Order and meaning are those of ``TemperatureLogitsWarper``, ``TopKLogitsWarper``, ``TopPLogitsWarper``,
    ``MinPLogitsWarper`` and ``TypicalLogitsWarper`` in transformers' ``_get_logits_processor`` (generation/utils.py,
    5.24). XTC is behind them, as in text-generation-webui and llama.cpp.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, stop: Collection[int]) -> None:
        self._vocab_size = vocab_size
        # Within float32, so that neither 0/0 nor inf/inf can come of an extreme temperature.
        limits = np.finfo(np.float32)
        self._temperature = np.float32(min(max(params.temperature, float(limits.tiny)), float(limits.max)))
        self._top_k = int(params.top_k) if 0 < params.top_k < vocab_size else 0
        self._top_p, self._min_p = float(params.top_p), np.float32(params.min_p)
        self._typical_p = float(params.typical_p)
        cuts = (
            (self._nucleus, params.top_p < 1),
            (self._probable, params.min_p > 0),
            (self._typical, params.typical_p < 1),
        )
        self._cuts: list[Callable[[Weights], Positions]] = [cut for cut, on in cuts if on]
        self._xtc = float(params.xtc_probability), float(params.xtc_threshold)
        self._stop = np.array(sorted(stop), np.int64)
        self._scratch: NDArray[np.float32] = np.empty(vocab_size, np.float32)
        self._weights: NDArray[np.float32] = np.empty(vocab_size, np.float32)
        self._cumulative: NDArray[np.float64] = np.empty(vocab_size, np.float64)
        self._mask: NDArray[np.bool_] = np.empty(vocab_size, np.bool_)

    def kept(self, logits: Row, top: np.float32, random: Callable[[], float]) -> tuple[Positions | None, Weights]:
        """Ids that are left, ascending (None: all), and their weights; one of weight 0 isn't left.

        The weights may lie in scratch memory, good until the next step. ``top`` is the largest logit. ``random`` gives
        numbers from 0 to 1, one a step where XTC is on.
        """
        ids = self._largest(logits) if self._top_k else None
        weights = self._weighed(logits if ids is None else logits[ids], top)
        return self._cut(ids, weights, self._cuts, random)

    def chooses_among(self, count: int) -> bool:
        """Whether what is left may ever lie within a row's ``count`` most probable tokens."""
        return self._top_k < count if self._top_k else self._top_p < 1 or bool(self._min_p > 0)

    def among(self, row: HeldRow, random: Callable[[], float]) -> tuple[Positions, Weights] | None:
        """As :meth:`kept`, to the bit, of a row that is held; None where tokens that it doesn't name may be left too.

        What is left ends above the least that is named, so that none of its equals is missing.
        """
        ids, values, cuts = row.ids, row.values, self._cuts
        if self._top_k:
            if self._top_k >= len(ids):
                return None
            named = int(np.count_nonzero(values >= values[self._top_k - 1]))
            if named == len(ids):
                return None
            ids, values = ids[:named], values[:named]
        order = np.argsort(ids)
        ids, weights = ids[order], self._weighed(values[order], values[0])
        if not self._top_k:
            stay = self._nucleus_among(row, weights) if self._top_p < 1 else self._probable_among(weights)
            if stay is None:
                return None
            ids, weights, cuts = ids[stay], weights[stay], cuts[1:]
        kept, weights = self._cut(ids, weights, cuts, random)
        assert kept is not None
        return kept, weights

    def _cut(
        self,
        ids: Positions | None,
        weights: Weights,
        cuts: Sequence[Callable[[Weights], Positions]],
        random: Callable[[], float],
    ) -> tuple[Positions | None, Weights]:
        """What cuts leave of ids and weights, and XTC of that."""
        for cut in cuts:
            stay = cut(weights)
            ids = stay if ids is None else ids[stay]
            weights = weights[stay]
        if self._xtc[0]:
            self._exclude_top(ids, weights, random())
        return ids, weights

    def _weighed(self, scores: Row, top: np.float32) -> Weights:
        """Unnormalised probabilities, of which the largest is 1; in scratch memory."""
        weights = self._weights[: scores.size]
        # Subtracting the maximum first makes the largest exponent 0, so nothing overflows but towards exp(-inf) = 0.
        with np.errstate(over="ignore", under="ignore"):
            np.subtract(scores, top, out=weights)
            np.divide(weights, self._temperature, out=weights)
            np.exp(weights, out=weights)
        return weights

    def draw(self, weights: Weights, number: float) -> int:
        """A position, with probability proportional to its weight where ``number`` is uniform in 0 to 1."""
        cumulative = np.cumsum(weights, dtype=np.float64, out=self._cumulative[: weights.size])
        total = cumulative[-1]
        # side="right" passes over weights of zero. Rounding may carry the product up to the total itself: then the
        # last position whose weight isn't zero is meant.
        drawn = np.searchsorted(cumulative, number * total, side="right")
        return int(min(drawn, np.searchsorted(cumulative, total)))

    def _largest(self, logits: Row) -> Positions:
        """Ids, ascending, of the top_k largest logits and of all that tie with the last of these."""
        # Partitioning a copy of the values beats argpartition, which moves (and allocates) 8-byte indices.
        np.copyto(self._scratch, logits)
        self._scratch.partition(self._vocab_size - self._top_k)
        np.greater_equal(logits, self._scratch[self._vocab_size - self._top_k], out=self._mask)
        return np.flatnonzero(self._mask)

    def _nucleus(self, weights: Weights) -> Positions:
        """The fewest largest weights whose sum reaches top_p of the whole; at least one."""
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
        kept: Positions = candidates[_largest_of(chosen, count, descending[count - 1])]
        return kept

    def _nucleus_among(self, row: HeldRow, weights: Weights) -> Positions | None:
        """As :meth:`_nucleus`, of the weights that are named; None where the others' sum decides how many stay."""
        descending = np.sort(weights)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)
        named = float(cumulative[-1])
        targets = self._top_p * named * (1 - 1e-9), self._top_p * (named + self._others(row))
        least, most = np.searchsorted(cumulative, targets).tolist()
        if least != most or least >= len(weights) or descending[least] == descending[-1]:
            return None
        return np.flatnonzero(_largest_of(weights, least + 1, descending[least]))

    def _others(self, row: HeldRow) -> float:
        """The most that the weights of tokens that aren't named may sum to.

        Their sum at temperature 1 is known, x being the exponentials. With a = 1 / temperature the sum of x ** a is at
        most the sum of x times max(x) ** (a - 1) for a >= 1, and by Jensen n * (mean of x) ** a for a < 1.
        """
        shifted = row.values.astype(np.float64) - float(row.values[0])
        with np.errstate(over="ignore", under="ignore"):
            total = math.exp(min(row.log_sum - float(row.values[0]), 700.0))
            others = max(total - float(np.exp(shifted).sum()), 0.0) + _ROUNDING * total
            power, count = 1 / float(self._temperature), self._vocab_size - len(row.ids)
            if power >= 1:
                return others * math.exp(max(float(shifted[-1]) * (power - 1), -700.0))
        return float(count * (others / max(count, 1)) ** power)

    def _probable_among(self, weights: Weights) -> Positions | None:
        return self._probable(weights) if self._top_p == 1 and self._min_p > 0 and weights.min() < self._min_p else None

    def _probable(self, weights: Weights) -> Positions:
        """The weights of at least min_p times the largest, which is 1."""
        return np.flatnonzero(np.greater_equal(weights, self._min_p, out=self._mask[: weights.size]))

    def _typical(self, weights: Weights) -> Positions:
        """The weights whose surprise is nearest to its mean, the entropy, as few as reach typical_p of the whole.

        Meister et al., Locally Typical Sampling, 2022. All that tie with the last one in stay.
        """
        size = weights.size
        total = float(weights.sum(dtype=np.float64))
        with np.errstate(divide="ignore", under="ignore"):
            logs = np.log(weights, out=self._scratch[:size])
            np.maximum(logs, _LEAST_LOG, out=logs)  # a weight of 0 has no part in the entropy
            products = np.multiply(weights, logs, out=self._cumulative.view(np.float32)[:size])
        mean = float(products.sum(dtype=np.float64)) / total
        # Surprise is log(total) - logs, entropy log(total) - mean: the total falls out of their difference.
        distances = np.subtract(logs, np.float32(mean), out=logs)
        np.abs(distances, out=distances)
        target = self._typical_p * total
        for reach in (*_REACHES, np.inf):
            near = np.flatnonzero(np.less_equal(distances, np.float32(reach), out=self._mask[:size]))
            masses = weights[near]
            if float(masses.sum(dtype=np.float64)) >= target:
                break
        last = _reaching(distances[near], masses, target)
        return np.flatnonzero(np.less_equal(distances, last, out=self._mask[:size]))

    def _exclude_top(self, ids: Positions | None, weights: Weights, number: float) -> None:
        """XTC: put the weights of all that are as probable as xtc_threshold to 0, but for the least of them.

        By p-e-w, text-generation-webui's pull request 6335. It leaves a step alone that would lose a stop token, or no
        answer would end; of equal weights the one of the lowest id stays.
        """
        probability, threshold = self._xtc
        if number >= probability:
            return
        floor = np.float32(threshold * float(weights.sum(dtype=np.float64)))
        top = np.flatnonzero(np.greater_equal(weights, floor, out=self._mask[: weights.size]))
        if top.size < 2:
            return
        top = np.delete(top, int(weights[top].argmin()))
        if not np.isin(self._stop, top if ids is None else ids[top]).any():
            weights[top] = 0


def _largest_of(weights: Weights, count: int, last: np.float32) -> NDArray[np.bool_]:
    """Which are the ``count`` largest, of which ``last`` is the least; of those that tie with it, the first ones."""
    keep: NDArray[np.bool_] = weights > last
    ties = np.flatnonzero(weights == last)
    keep[ties[: count - int(np.count_nonzero(keep))]] = True
    return keep


def _reaching(values: NDArray[np.float32], masses: Weights, target: float) -> np.float32:
    """The smallest value up to which the masses sum to ``target``; the largest value where all don't.

    Halves first, by the mean, as sorting takes the longest by far.
    """
    below = 0.0
    while values.size > _FEW:
        lower = values <= values.mean()
        if lower.all() or not lower.any():  # equal, but for rounding
            break
        mass = below + float(masses[lower].sum(dtype=np.float64))
        if mass < target:
            below = mass
            np.logical_not(lower, out=lower)
        values, masses = values[lower], masses[lower]
    order = np.argsort(values, kind="stable")
    sums = below + np.cumsum(masses[order], dtype=np.float64)
    last: np.float32 = values[order[min(int(np.searchsorted(sums, target)), len(order) - 1)]]
    return last
