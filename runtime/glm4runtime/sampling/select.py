"""Where the sum over values in order reaches a target, without sorting them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]  # [n]

# Bits of a float32 that isn't negative, read as an integer, have the order of the floats. Their distances from the
# smallest (or largest) are looked at in digits of 10 or 11 bits, the highest first: so few that the sums of all digits
# stay in the first-level cache.
_SHIFTS = (21, 11, 0)


class Selector:
    """Owns the memory that :meth:`reaching` needs: fresh memory of this size costs it more than all arithmetic."""

    def __init__(self, size: int) -> None:
        """size: the most values."""
        # As bincount takes them without copies.
        self._digits = np.empty(size, np.intp)
        self._masses = np.empty(size, np.float64)

    def reaching(
        self, values: Floats, masses: Floats, target: float, *, largest_first: bool = False
    ) -> tuple[np.float32, float]:
        """The value up to which the masses sum to ``target``, and the sum of the masses before it.

        Args:
            values: n >= 1 numbers, none of them negative, NaN or -0.
            masses: what each of them weighs, 0 or more.
            target: where it is more than all masses, by rounding, the last value is found.
            largest_first: count from the largest value down, not from the smallest up.

        A radix selection: masses are summed by the values' highest digits, and only the values of the digit in which
        the sum reaches the target are looked at further. Sums are float64, within a digit in the order of positions.
        """
        bits, before = values.view(np.int32), 0.0
        for shift in _SHIFTS:
            low, high = bits.min(), bits.max()
            if not (high - low) >> shift:
                continue  # one digit only
            digits, weighed = self._digits[: bits.size], self._masses[: bits.size]
            np.copyto(digits, high - bits if largest_first else bits - low)
            digits >>= shift
            np.copyto(weighed, masses)
            sums = before + np.cumsum(np.bincount(digits, weighed))
            digit = min(int(np.searchsorted(sums, target)), sums.size - 1)
            if digit:
                before = float(sums[digit - 1])
            here = np.flatnonzero(digits == digit)
            bits, masses = bits[here], masses[here]
        return bits[:1].view(np.float32)[0], before
