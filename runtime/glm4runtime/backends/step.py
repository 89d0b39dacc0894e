"""What a step graph is given for a run: tokens, positions, write index, mask, wanted rows. No device.

Everything lives in arrays that are allocated once; a run writes what changed since the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from glm4runtime.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGIT_ROWS,
    POSITION_IDS,
    WRITE_INDICES,
    BundleError,
    CacheSpec,
    past_name,
)
from glm4runtime.contract.engine_spec import EngineSpec

INTEGERS = (INPUT_IDS, POSITION_IDS, WRITE_INDICES, LOGIT_ROWS)  # int64; the mask is bool

Allocate = Callable[[str, tuple[int, ...]], np.ndarray]  # an int64 host array for the input of this name
Fill = Callable[[int, int, int, bool], None]


def input_shapes(count: int, rows: int, max_seq: int, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of a run's inputs, the cache apart: ``count`` tokens of each sequence, logits of ``rows`` of them."""
    return {
        INPUT_IDS: (batch, count),
        POSITION_IDS: (batch, count),
        WRITE_INDICES: (batch,),
        ATTENTION_MASK: (batch, 1, count, max_seq),
        LOGIT_ROWS: (batch, rows),
    }


def cache_shapes(spec: CacheSpec, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of the cache's inputs for so many sequences."""
    shape = (batch, spec.kv_heads, spec.max_seq_len, spec.head_dim)
    return {past_name(layer, part): shape for layer in range(spec.layers) for part in ("key", "value")}


class RunInputs:
    """The int64 inputs of runs over up to ``width`` tokens, of which up to ``rows`` want logits."""

    def __init__(self, width: int, rows: int, allocate: Allocate) -> None:
        shapes = input_shapes(width, rows, 0)
        arrays = {name: allocate(name, shapes[name]) for name in INTEGERS}
        self._ids, self._positions = arrays[INPUT_IDS][0], arrays[POSITION_IDS][0]
        self._write, self._rows = arrays[WRITE_INDICES], arrays[LOGIT_ROWS][0]
        self._count_up = np.arange(width)

    def fill(
        self, tokens: Sequence[int] | np.ndarray, start: int, *, every_row: bool = False, padding: int = 0
    ) -> None:
        """A run of ``tokens`` from position ``start``, with logits of ``every_row``, or of the last before padding."""
        count = len(tokens)
        self._ids[:count] = tokens
        np.add(self._count_up[:count], start, out=self._positions[:count])
        self._write[0] = start
        if every_row:
            self._rows[:count] = self._count_up[:count]
        else:
            self._rows[0] = count - 1 - padding


class Staircase:
    """What changes in a mask [rows, width] from run to run: row i of a run from ``start`` is true up to start + i.

    Two such masks differ in a band along the diagonal: ``height`` rows of ``bandwidth`` cells, each row beginning one
    cell further than the row above. In memory they are :attr:`pitch` cells apart, so a band is one strided fill:
    ``fill(first_cell, bandwidth, height, value)``. A decode step changes one cell. Rows that a run leaves out keep what
    they had and are caught up when they are next used.
    """

    def __init__(self, rows: int, width: int, fill: Fill) -> None:
        """The mask must hold :meth:`first` to begin with."""
        if rows > width:
            raise ValueError(f"a mask of {rows} rows for {width} positions: a run cannot have more tokens than that")
        self.pitch = width + 1
        self._rows, self._width, self._fill = rows, width, fill
        self._starts = [(rows, 0)]  # a stack: rows up to the first number, from where the entry above ends, have start

    def first(self) -> np.ndarray:
        """The mask of a run from position 0, bool [rows, width]."""
        return np.tri(self._starts[0][0], self._width, dtype=np.bool_)

    def move(self, start: int, count: int) -> None:
        """Make the first ``count`` rows those of a run from ``start``; the run must end within the width."""
        row, starts = 0, self._starts
        self._starts = []  # until the mask is what they say: an interrupt may come between
        if not starts:
            self._reset()
            starts = [(self._rows, 0)]
        while row < count:
            end, old = starts[-1]
            if end <= count:
                starts.pop()
            else:
                end = count
            if old < start:
                self._fill(row * self.pitch + old + 1, start - old, end - row, True)
            elif old > start:
                self._fill(row * self.pitch + start + 1, old - start, end - row, False)
            row = end
        starts.append((count, start))
        self._starts = starts

    def _reset(self) -> None:
        for row in range(self._rows):
            self._fill(row * self._width, row + 1, 1, True)
            self._fill(row * self._width + row + 1, self._width - row - 1, 1, False)


def fill_band(mask: np.ndarray) -> Fill:
    """A :class:`Staircase`'s ``fill`` for a mask in host memory, bool and contiguous, its last dim the width."""
    cells, pitch = mask.reshape(-1), mask.shape[-1] + 1

    def fill(first: int, bandwidth: int, height: int, value: bool) -> None:
        if height == 1:
            cells[first : first + bandwidth] = value
        else:
            band = np.lib.stride_tricks.as_strided(cells[first:], (height, bandwidth), (pitch, 1))
            band[...] = value

    return fill


def profiles_for(spec: EngineSpec, widths: int, *, every_row: bool) -> list[int]:
    """The engine's optimization profile for runs of 1 to ``widths`` tokens of one sequence: index ``[count - 1]``.

    Raises BundleError where none serves one of them.
    """
    return [profile_for(spec, count, count if every_row else 1) for count in range(1, widths + 1)]


def profile_for(spec: EngineSpec, count: int, rows: int, batch: int = 1) -> int:
    """The engine's optimization profile for a run of ``count`` tokens of each of ``batch`` sequences.

    Where several serve, one that isn't made for larger batches, and of these the one made for the shortest runs. Raises
    BundleError where none does.
    """
    fitting = [
        (profile.batch[1] > batch, profile.seq[2], index)
        for index, profile in enumerate(spec.profiles)
        if _within(batch, profile.batch) and _within(count, profile.seq) and _within(rows, profile.rows)
    ]
    if not fitting:
        whose = "one sequence" if batch == 1 else f"each of {batch} sequences"
        raise BundleError(
            f"{spec.file}: none of its profiles serves a run of {count} tokens of {whose} with {rows} rows of "
            "logits; build the engine again with `glm4export build --target tensorrt`"
        )
    return min(fitting)[2]


def most_sequences(spec: EngineSpec) -> int:
    """The most sequences that a step of one token each may have; 0 where the engine runs none."""
    return max((p.batch[2] for p in spec.profiles if _within(1, p.seq) and _within(1, p.rows)), default=0)


def longest_run(spec: EngineSpec) -> int:
    """The most tokens of one sequence that a run of the engine may have; 0 where it serves none."""
    return max((p.seq[2] for p in spec.profiles if _within(1, p.batch)), default=0)


def _within(value: int, ends: tuple[int, int, int]) -> bool:
    return ends[0] <= value <= ends[2]
