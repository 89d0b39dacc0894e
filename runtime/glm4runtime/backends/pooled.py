"""Many sequences whose caches lie in one pool: a prompt is a run over one place of it, a step one over the first ones.

What both kinds of batch runner share, in ONNX Runtime and on a TensorRT engine: places, and moving rows about.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.places import Places
from glm4runtime.backends.pool import Pool


class PooledRunner(BatchRunner):
    """A batch runner over ``_pool``. Subclasses call :meth:`_use_pool` when it is there."""

    def _use_pool(self, pool: Pool, places: Places) -> None:
        self._pool, self._places = pool, places
        self._filled = [0] * self.slots  # rows of each slot that are worth moving
        self._lost: set[int] = set()  # slots of whose rows a move failed half-way
        self._logits = np.empty((self.slots, self.vocab_size), np.float32)

    def read_rows(self, slot: int, first: int, end: int) -> np.ndarray:
        self._check_room(slot, first, end)
        self._require_rows(slot, end)
        return self._pool.read(self._places.place[slot], first, end).reshape(-1)

    def write_rows(self, slot: int, first: int, block: np.ndarray) -> None:
        rows, over = divmod(block.size, self.row_bytes)
        if block.dtype != np.uint8 or over:
            raise ValueError(f"write_rows: {block.dtype} {list(block.shape)}: not uint8 rows of {self.row_bytes} bytes")
        self._check_room(slot, first, first + rows)
        self._require_rows(slot, first)
        self._pool.write(self._places.place[slot], first, block.reshape(self._pool.block_shape(rows)))
        self._filled[slot] = max(self._filled[slot], first + rows)

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        self._check_room(source, 0, rows)
        self._check_room(target, 0, rows)
        self._require_rows(source, rows)
        self._require_rows(target, 0)
        self._pool.copy(self._places.place[source], self._places.place[target], 0, rows)
        self._filled[target] = rows

    def release(self, slot: int) -> None:
        self._check_room(slot, 0, 0)
        self._require_rows(slot, 0)
        self._filled[slot] = 0

    def _run_step(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        for slot, start in zip(slots, starts, strict=True):
            self._require_rows(slot, start)
        self._arrange(slots)
        order = [self._places.place[slot] for slot in slots]
        by_place = sorted(range(len(order)), key=order.__getitem__)  # they are the first places
        for slot, start in zip(slots, starts, strict=True):
            self._filled[slot] = start + 1
        rows = self._run_places(
            [slots[i] for i in by_place], [tokens[i] for i in by_place], [starts[i] for i in by_place]
        )
        if order == list(range(len(order))):
            return rows
        return np.take(rows, order, axis=0, out=self._logits[: len(order)])

    def _arrange(self, slots: Sequence[int]) -> None:
        """Give the slots of a step their places."""
        for one, other in self._places.moves(slots):
            owners = [self._places.slot(place) for place in (one, other)]
            moved = {slot for slot in owners if slot is not None} - self._lost
            self._lost |= moved  # until they are
            self._pool.exchange(one, other, *(0 if slot is None else self._filled[slot] for slot in owners))
            self._lost -= moved
            self._places.exchange(one, other)

    def _require_rows(self, slot: int, rows: int) -> None:
        """Raise RuntimeError where a slot's first rows were lost; from row 0 on it may be written again."""
        if slot in self._lost:
            if rows:
                raise RuntimeError(f"the rows of slot {slot} were lost: moving them to another place failed")
            self._lost.discard(slot)

    @abstractmethod
    def _run_places(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        """A step of the slots that have the first places, in that order; returns logits [len(slots), vocab]."""
