"""How long the sequences of a run are, told to a graph by a mask or, in bundles for ``cuda``, by numbers.

Numbers have one shape for every length, and no node computes with them on the host, so that a step can be captured as a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from glm4runtime.backends.cache import Buffer
from glm4runtime.contract import ATTENTION_MASK, SEQLENS_K, TOTAL_SEQUENCE_LENGTH, GraphSpec


def takes_lengths(graph: GraphSpec) -> bool:
    """Whether a graph has numbers for inputs, in the place of a mask."""
    return any(tensor.name == SEQLENS_K for tensor in graph.inputs)


def lengths_of(graph: GraphSpec, rows: int, max_seq_len: int, device: str, device_id: int = 0) -> Mask | Lengths:
    """What tells ``graph`` of up to ``rows`` sequences of up to ``max_seq_len`` tokens."""
    if takes_lengths(graph):
        return Lengths(rows, device, device_id)
    return Mask(rows, max_seq_len, device, device_id)


class Lengths:
    """``seqlens_k`` int32 [batch] on the graph's device, ``total_sequence_length`` int32 [] in the host's memory."""

    def __init__(self, rows: int, device: str, device_id: int = 0) -> None:
        self._last = Buffer((rows,), "int32", device, device_id)
        self._total = Buffer((), "int32", "cpu")

    def bind(self, binding: Any, rows: int) -> None:
        """Bind what has the same address and shape in every run of so many sequences."""
        self._last.bind_input(binding, SEQLENS_K, (rows,))
        self._total.bind_input(binding, TOTAL_SEQUENCE_LENGTH)

    def tell(self, binding: Any, lengths: Sequence[int], total: int) -> None:
        """Of a run behind which each sequence has so many tokens, none more than ``total``."""
        del binding  # has them
        self._last.host[: len(lengths)] = [length - 1 for length in lengths]
        self._last.upload()
        self._total.host[...] = total


class Mask:
    """``attention_mask`` int64 [batch, total]: a sequence's tokens as ones, from the first on."""

    def __init__(self, rows: int, max_seq_len: int, device: str, device_id: int = 0) -> None:
        self._size, self._place = (rows * max_seq_len,), (device, device_id)
        self._shape = (0, 0)  # sequences and tokens that the mask is laid out for
        self._lengths: list[int] = []  # ones in each of its rows
        self._bound: dict[Any, tuple[int, int]] = {}  # bindings that have it in that shape

    def bind(self, binding: Any, rows: int) -> None:
        """Nothing: its shape differs from run to run."""

    def tell(self, binding: Any, lengths: Sequence[int], total: int) -> None:
        """Of a run behind which each sequence has so many tokens, none more than ``total``."""
        if all(length == total for length in lengths):
            self._bound.pop(binding, None)
            self._ones.bind_input(binding, ATTENTION_MASK, (len(lengths), total))
            return
        self._fill(list(lengths), total)
        if self._bound.get(binding) != self._shape:
            self._bound.pop(binding, None)  # until it's bound: an interrupt may come between
            self._mixed.bind_input(binding, ATTENTION_MASK, self._shape)
            self._bound[binding] = self._shape

    @cached_property
    def _ones(self) -> Buffer:
        ones = Buffer(self._size, "int64", *self._place)
        ones.write(np.ones(self._size, np.int64))
        return ones

    @cached_property
    def _mixed(self) -> Buffer:
        return Buffer(self._size, "int64", *self._place)

    def _fill(self, lengths: list[int], total: int) -> None:
        """So many ones in each row, changed where they differ from the run before."""
        count = len(lengths)
        mask = self._mixed.host[: count * total].reshape(count, total)
        if self._shape != (count, total):
            self._shape = (0, 0)
            mask[...] = 0
            self._lengths = [0] * count
            self._shape = (count, total)
        for row, (old, new) in enumerate(zip(self._lengths, lengths, strict=True)):
            mask[row, min(old, new) : max(old, new)] = new > old
        self._lengths = lengths
        self._mixed.upload()
