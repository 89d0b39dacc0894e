"""Filters: temperature, and which tokens are left to draw from.

Tokens are given by weights, unnormalised probabilities of which the largest is 1. A cut takes them and tells which
stay. GLM-4's vocabulary has 151552 entries, so nothing here sorts them: where a cut ends is found digit by digit
(:mod:`glm4runtime.sampling.select`), a few passes also over rows without a peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from glm4runtime.backends.held_row import HeldRow
from glm4runtime.sampling.params import SamplingParams
from glm4runtime.sampling.rows import Row, kth_largest
from glm4runtime.sampling.scratch import Scratch

Weights = NDArray[np.float32]  # [n]
Positions = NDArray[np.intp]
Mask = NDArray[np.bool_]  # [n]

# Where is looked first, as few tokens of a trained model are there: above these floors, relative to the most probable
# token, and within these reaches, in nats from typical surprise.
_FLOORS = (1e-2, 1e-4)
_REACHES = (2.0, 8.0)
_DENSE = 4  # where more than one in so many tokens is left, picking them out takes longer than passing over the others
_ROUNDING = 1e-4  # how far a device's float32 sum of a row's exponentials may be off, as a share; they differ by 1e-6
_SUMMING = 1e-9  # likewise of sums in float64, whose order differs
_LEAST = np.finfo(np.float32).smallest_subnormal
_LEAST_LOG = np.float32(-104.0)  # below the logarithm of the smallest float32


class Filters:
    """Temperature, top-k, top-p, min-p, typical and XTC, in this order.

    Order and meaning are those of ``TemperatureLogitsWarper``, ``TopKLogitsWarper``, ``TopPLogitsWarper``,
    ``MinPLogitsWarper`` and ``TypicalLogitsWarper`` in transformers' ``_get_logits_processor`` (generation/utils.py,
    5.24). XTC is behind them, as in text-generation-webui and llama.cpp.
    """

    def __init__(self, params: SamplingParams, scratch: Scratch, stop: Collection[int]) -> None:
        self._scratch, self._vocab_size = scratch, scratch.vocab_size
        # Within float32, so that neither 0/0 nor inf/inf can come of an extreme temperature.
        limits = np.finfo(np.float32)
        self._temperature = np.float32(min(max(params.temperature, float(limits.tiny)), float(limits.max)))
        self._top_k = int(params.top_k) if 0 < params.top_k < self._vocab_size else 0
        self._top_p, self._min_p = float(params.top_p), np.float32(params.min_p)
        self._typical_p = float(params.typical_p)
        cuts = (
            (Filters._nucleus, params.top_p < 1),
            (Filters._probable, params.min_p > 0),
            (Filters._typical, params.typical_p < 1),
        )
        # Not bound to this object: it would hold itself, and go no sooner than the garbage collector comes.
        self._cuts: list[_Cut] = [cut for cut, on in cuts if on]
        self._xtc = float(params.xtc_probability), float(params.xtc_threshold)
        self._stop = np.array(sorted(stop), np.int64)

    def kept(self, logits: Row, top: np.float32, random: Callable[[], float]) -> tuple[Positions | None, Weights]:
        """Ids that are left, ascending (None: all), and their weights; one of weight 0 isn't left.

        The weights may lie in scratch memory, good until any sampler that shares it is called. ``top`` is the largest
        logit. ``random`` gives numbers from 0 to 1, one a step where XTC is on.
        """
        ids = self._largest(logits) if self._top_k else None
        weights = self._weighed(logits if ids is None else logits[ids], top)
        return self._cut(ids, weights, self._cuts, random)

    def chooses_among(self, count: int) -> bool:
        """Whether what is left may ever lie within a row's ``count`` most probable tokens."""
        if count * _DENSE > self._vocab_size:
            return False  # such shares are cut in another way, whose sums have other last bits
        return self._top_k < count if self._top_k else self._top_p < 1 or bool(self._min_p > 0)

    def among(self, row: HeldRow, random: Callable[[], float]) -> tuple[Positions, Weights] | None:
        """As :meth:`kept`, to the bit, of a row that is held; None where tokens that it doesn't name may be left too.

        What is left ends above the least that is named, so that none of its equals is missing.
        """
        ids, values, cuts = row.ids, row.values, self._cuts
        if not self.chooses_among(len(ids)):
            return None
        if self._top_k:
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
            left = np.flatnonzero(stay)
            ids, weights, cuts = ids[left], weights[left], cuts[1:]
        kept, weights = self._cut(ids, weights, cuts, random)
        assert kept is not None
        return kept, weights

    def _weighed(self, scores: Row, top: np.float32) -> Weights:
        """Unnormalised probabilities, of which the largest is 1; in scratch memory."""
        weights = self._scratch.weights[: scores.size]
        # Subtracting the maximum first makes the largest exponent 0, so nothing overflows but towards exp(-inf) = 0.
        with np.errstate(over="ignore", under="ignore"):
            np.subtract(scores, top, out=weights)
            np.divide(weights, self._temperature, out=weights)
            np.exp(weights, out=weights)
        return weights

    def _cut(
        self,
        ids: Positions | None,
        weights: Weights,
        cuts: Sequence[_Cut],
        random: Callable[[], float],
    ) -> tuple[Positions | None, Weights]:
        """What cuts leave of ids and weights, and XTC of that."""
        for cut in cuts:
            stay = cut(self, weights)
            if _dense(stay):
                weights *= stay
            else:
                left = np.flatnonzero(stay)
                ids = left if ids is None else ids[left]
                weights = weights[left]
        if self._xtc[0]:
            self._exclude_top(ids, weights, random())
        return ids, weights

    def draw(self, weights: Weights, number: float) -> int:
        """A position, with probability proportional to its weight where ``number`` is uniform in 0 to 1."""
        cumulative = np.cumsum(weights, dtype=np.float64, out=self._scratch.cumulative[: weights.size])
        total = cumulative[-1]
        # side="right" passes over weights of zero. Rounding may carry the product up to the total itself: then the
        # last position whose weight isn't zero is meant.
        drawn = np.searchsorted(cumulative, number * total, side="right")
        return int(min(drawn, np.searchsorted(cumulative, total)))

    def _largest(self, logits: Row) -> Positions:
        """Ids, ascending, of the top_k largest logits and of all that tie with the last of these."""
        return np.flatnonzero(np.greater_equal(logits, kth_largest(logits, self._top_k), out=self._scratch.mask))

    def _nucleus(self, weights: Weights) -> Mask:
        """The fewest largest weights whose sum reaches top_p of the whole; at least one."""
        target = self._top_p * float(weights.sum(dtype=np.float64))
        among = weights
        for floor in _FLOORS:
            mask = np.greater_equal(weights, np.float32(floor), out=self._scratch.mask[: weights.size])
            if _dense(mask):
                break
            likely = weights[np.flatnonzero(mask)]
            if float(likely.sum(dtype=np.float64)) >= target:
                among = likely
                break
        last, before = self._scratch.selector.reaching(among, among, target, largest_first=True)
        stay = np.greater_equal(weights, last, out=self._scratch.mask[: weights.size])
        # Of the tokens that tie with the last one in, the lowest ids stay: as many as it takes.
        ties = np.flatnonzero(weights == last)
        stay[ties[max(1, math.ceil((target - before) / float(max(last, _LEAST)))) :]] = False  # 0: by rounding
        return stay

    def _nucleus_among(self, row: HeldRow, weights: Weights) -> Mask | None:
        """As :meth:`_nucleus`, of the weights that are named; None where the others' sum decides how many stay."""
        descending = np.sort(weights)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)
        named = float(cumulative[-1])
        sums = named * (1 - _SUMMING), named * (1 + _SUMMING) + self._others(row)
        least, most = (int(np.searchsorted(cumulative, self._top_p * total)) for total in sums)
        if least != most or least == len(weights) or descending[least] == descending[-1]:
            return None
        stay: Mask = weights > descending[least]
        ties = np.flatnonzero(weights == descending[least])
        stay[ties[: least + 1 - int(np.count_nonzero(stay))]] = True
        return stay

    def _others(self, row: HeldRow) -> float:
        """The most that the weights of tokens that aren't named may sum to.

        Their sum at temperature 1 is known, x being the exponentials. With a = 1 / temperature the sum of x ** a is at
        most the sum of x times max(x) ** (a - 1) for a >= 1, and by Jensen n * (mean of x) ** a for a < 1.
        """
        shifted = row.values.astype(np.float64) - float(row.values[0])
        total = math.exp(min(row.log_sum - float(row.values[0]), 700.0))
        with np.errstate(under="ignore"):
            others = max(total - float(np.exp(shifted).sum()), 0.0) + _ROUNDING * total
        power, count = 1 / float(self._temperature), self._vocab_size - len(row.ids)
        if power >= 1:
            return others * math.exp(max(float(shifted[-1]) * (power - 1), -700.0))
        return float(count * (others / count) ** power)

    def _probable_among(self, weights: Weights) -> Mask | None:
        return self._probable(weights) if weights.min() < self._min_p else None

    def _probable(self, weights: Weights) -> Mask:
        """The weights of at least min_p times the largest, which is 1."""
        return np.greater_equal(weights, self._min_p, out=self._scratch.mask[: weights.size])

    def _typical(self, weights: Weights) -> Mask:
        """The weights whose surprise is nearest to its mean, the entropy, as few as reach typical_p of the whole.

        Meister et al., Locally Typical Sampling, 2022. All that tie with the last one in stay.
        """
        size = weights.size
        total = float(weights.sum(dtype=np.float64))
        with np.errstate(divide="ignore", under="ignore"):
            logs = np.log(weights, out=self._scratch.logs[:size])
            np.maximum(logs, _LEAST_LOG, out=logs)  # a weight of 0 has no part in the entropy
            products = np.multiply(weights, logs, out=self._scratch.cumulative.view(np.float32)[:size])
        mean = float(products.sum(dtype=np.float64)) / total
        # Surprise is log(total) - logs, entropy log(total) - mean: the total falls out of their difference.
        distances = np.subtract(logs, np.float32(mean), out=logs)
        np.abs(distances, out=distances)
        target = self._typical_p * total
        among, masses = distances, weights
        for reach in _REACHES:
            mask = np.less_equal(distances, np.float32(reach), out=self._scratch.mask[:size])
            if _dense(mask):
                break
            near = np.flatnonzero(mask)
            if float(weights[near].sum(dtype=np.float64)) >= target:
                among, masses = distances[near], weights[near]
                break
        last, _ = self._scratch.selector.reaching(among, masses, target)
        return np.less_equal(distances, last, out=self._scratch.mask[:size])

    def _exclude_top(self, ids: Positions | None, weights: Weights, number: float) -> None:
        """XTC: put the weights of all that are as probable as xtc_threshold to 0, but for the least of them.

        By p-e-w, text-generation-webui's pull request 6335. It leaves a step alone that would lose a stop token, or no
        answer would end; of equal weights the one of the lowest id stays.
        """
        probability, threshold = self._xtc
        if number >= probability:
            return
        floor = np.float32(threshold * float(weights.sum(dtype=np.float64)))
        floor = max(floor, _LEAST)  # what isn't left can't be the one that stays
        top = np.flatnonzero(np.greater_equal(weights, floor, out=self._scratch.mask[: weights.size]))
        if top.size < 2:
            return
        top = np.delete(top, int(weights[top].argmin()))
        if not _holds(top if ids is None else ids[top], self._stop):
            weights[top] = 0


_Cut = Callable[[Filters, Weights], Mask]


def _dense(mask: Mask) -> bool:
    return int(np.count_nonzero(mask)) * _DENSE > mask.size


def _holds(ids: Positions, wanted: NDArray[np.int64]) -> bool:
    """Whether any of ``wanted`` is among ids, which ascend; ``np.isin`` would sort them."""
    return bool((ids[np.searchsorted(ids[:-1], wanted)] == wanted).any())
