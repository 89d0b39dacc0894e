"""What runs of a TensorRT engine read, at addresses that stay: integers and a mask, for one sequence or for many.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

from glm4runtime.backends.cuda import ALIGNMENT
from glm4runtime.backends.step import INTEGERS, RunInputs, Staircase, input_shapes
from glm4runtime.backends.trt_engine import DeviceEngine
from glm4runtime.contract import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, WRITE_INDICES


class SequenceInputs:
    """Of runs over one sequence: a block of integers, filled on the host, and a mask, changed on the device."""

    def __init__(self, engine: DeviceEngine, width: int, rows: int, max_seq: int) -> None:
        """Of up to ``width`` tokens with logits of up to ``rows``."""
        shapes = input_shapes(width, rows, max_seq)
        block = _Block(engine, {name: shapes[name] for name in INTEGERS})
        self._inputs = RunInputs(width, rows, lambda name, shape: block.integers(name, shape))
        self.upload = block.upload(block.size)
        cuda, mask, pitch = engine.cuda, engine.memory.device(width * max_seq, "mask"), max_seq + 1

        def fill(first: int, bandwidth: int, height: int, value: bool) -> None:
            cuda("cudaMemset2DAsync", mask + first, pitch, int(value), bandwidth, height, engine.stream)

        self._stairs = Staircase(width, max_seq, fill)
        first = self._stairs.first()
        cuda("cudaMemcpy", mask, first.ctypes.data, first.nbytes, cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice)
        self.addresses = {**block.addresses, ATTENTION_MASK: mask}

    def fill(
        self, tokens: Sequence[int] | np.ndarray, start: int, *, every_row: bool = False, padding: int = 0
    ) -> None:
        """Ready the inputs of a run: integers on the host, the mask on the device."""
        self._inputs.fill(tokens, start, every_row=every_row, padding=padding)
        self._stairs.move(start, len(tokens))


class StepInputs:
    """Of steps: one token for each of the first sequences of a batch. All on the host; a run uploads its part.

    Of the mask that is a run's whole rows, where one cell of each has changed: one copy, in the graph that is captured.
    """

    def __init__(self, engine: DeviceEngine, sequences: int, max_seq: int) -> None:
        shapes = input_shapes(1, 1, max_seq, sequences)
        block = _Block(engine, {name: shapes[name] for name in INTEGERS}, mask=shapes[ATTENTION_MASK])
        self._ids = block.integers(INPUT_IDS, (sequences,))
        self._positions = block.integers(POSITION_IDS, (sequences,))
        self._writes = block.integers(WRITE_INDICES, (sequences,))  # and rows of logits are zeros: the one that is
        self._mask = block.mask
        self._mask[:, 0] = True  # a row without any cell would be no number
        self._seen = [1] * sequences  # cells of each row that are true
        self._block, self._max_seq = block, max_seq
        self.addresses = block.addresses

    def upload(self, sequences: int) -> Callable[[], None]:
        """What puts the copy of so many sequences' inputs on the stream."""
        return self._block.upload(self._block.mask_offset + sequences * self._max_seq)

    def fill(self, tokens: Sequence[int], starts: Sequence[int], count: int) -> None:
        """Ready a step that appends a token to each sequence at its start, with fillers behind them up to ``count``.

        A filler writes to its sequence's last row of all, which must be nobody's.
        """
        given = len(tokens)
        self._ids[:given], self._positions[:given], self._writes[:given] = tokens, starts, starts
        self._ids[given:count] = self._positions[given:count] = 0
        self._writes[given:count] = self._max_seq - 1
        for row, start in enumerate(starts):
            old, new = self._seen[row], start + 1
            self._mask[row, min(old, new) : max(old, new)] = new > old
            self._seen[row] = new


class _Block:
    """Tensors side by side in pinned host memory and, as far as they are uploaded, on the device; bool ones last."""

    def __init__(
        self,
        engine: DeviceEngine,
        shapes: Mapping[str, tuple[int, ...]],
        mask: tuple[int, ...] | None = None,
    ) -> None:
        """shapes: of int64 tensors. mask: of a bool one, whose first dim is the batch."""
        self._engine, self._shapes, self._mask = engine, shapes, mask
        self._offsets, self.mask_offset = _offsets(shapes)
        self.size = self.mask_offset + (0 if mask is None else math.prod(mask))
        device = engine.memory.device(self.size, "inputs")
        self._device, (self._pinned, self._view) = device, engine.memory.pinned(self.size)
        self._view[:] = 0
        self.addresses = {name: device + offset for name, offset in self._offsets.items()}
        if mask is not None:
            self.addresses[ATTENTION_MASK] = device + self.mask_offset

    def integers(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The host's int64 array of a tensor."""
        return self._view[self._offsets[name] :][: 8 * math.prod(shape)].view(np.int64).reshape(shape)

    @cached_property
    def mask(self) -> np.ndarray:
        """The host's mask, bool [batch, cells]."""
        assert self._mask is not None
        return self._view[self.mask_offset :].view(np.bool_).reshape(self._mask[0], -1)

    def upload(self, size: int) -> Callable[[], None]:
        """What puts the copy of the first ``size`` bytes on the stream."""
        kind = self._engine.cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        return self._engine.cuda.checked("cudaMemcpyAsync", self._device, self._pinned, size, kind, self._engine.stream)


def _offsets(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """Where each int64 tensor begins in a block that holds them all, in bytes, and the block's size."""
    offsets, size = {}, 0
    for name, shape in shapes.items():
        offsets[name] = size
        size += -(-8 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, size
