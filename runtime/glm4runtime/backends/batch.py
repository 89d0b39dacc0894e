"""Many sequences on one bundle, each in a slot: prompts one by one, steps all at once. Subclasses run the graphs.

:class:`glm4runtime.backends.runner.Runner` is the same for one sequence. This one keeps no tokens: who calls it says
where in a slot a run's rows begin, and what is behind them is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from glm4runtime.backends.prompt_runs import lacking, prompt_runs, run_start
from glm4runtime.backends.runner import MAX_RUN, unknown_adapter
from glm4runtime.backends.token_ids import checked_ids
from glm4runtime.contract import Manifest, UserError


class BatchRunner(ABC):
    """``slots`` sequences of up to ``max_seq_len`` tokens. Not thread-safe: one thread owns it.

    A slot is a number in 0..slots-1. Where ``invariant`` is True, a row's logits and cache have the same bits whatever
    other slots are in the run, however many, in any order, and however a prompt was cut into runs; rows that
    :meth:`step` writes are not those that :meth:`prefill` writes. The logits returned are the runner's own buffers,
    float32, good until the next call of any method. A run that raises leaves the rows it was to write, and no others,
    in any state.
    """

    manifest: Manifest
    slots: int
    max_seq_len: int  # tokens of one sequence
    prefill_chunk: int  # the most prompt tokens of one run
    vocab_size: int
    invariant: bool
    granule: int  # steps have a multiple of so many rows; fillers stand behind a set's last one
    prompt_granule: int  # and runs over one sequence of so many tokens
    draft_rows: int  # tokens of a verify() beyond which it takes the time of several
    row_bytes: int  # of cache per token: keys and values of every layer
    adapters: Mapping[str, str]  # those that are loaded: sha256 of what each holds, by its name

    def __init__(self, manifest: Manifest, *, slots: int, max_seq_len: int | None, prefill_chunk: int) -> None:
        """slots: at least 1. max_seq_len: at most the bundle's, its default. prefill_chunk: at least 1.

        Raises UserError for a max_seq_len out of range.
        """
        limit = manifest.cache.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise UserError(f"max_seq_len={max_seq_len} is not in 1..{limit}, the positions the bundle was built for")
        self.manifest = manifest
        self.slots = slots
        self.max_seq_len = max_seq_len or limit
        self.prefill_chunk = min(prefill_chunk, self.max_seq_len)
        self.vocab_size = manifest.vocab_size
        self.invariant = False
        self.granule = self.prompt_granule = 1
        self.draft_rows = MAX_RUN
        self.adapters = {}
        self.row_bytes = manifest.cache.bytes_per_token
        self.closed = False
        self._adapter: list[str | None] = [None] * slots  # of each slot

    @property
    def prompt_grid(self) -> int:
        """Rows that a prefix hit has are cut to a multiple of this: a prompt's runs begin there.

        With an int8 cache, where a run attends to its own rows before they are rounded, that is ``prefill_chunk``.
        """
        coarse = self.invariant and self.manifest.cache.dtype == "int8"
        return self.prefill_chunk - self.prefill_chunk % self.prompt_granule if coarse else self.prompt_granule

    def prompt_runs(self, start: int, end: int, width: int | None = None) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each :meth:`prefill` of a prompt of ``end`` tokens, ``start`` of them done.

        They join, and have about ``width`` tokens, by default and at most ``prefill_chunk``; with an int8 cache always
        as many. The first one may begin in front of ``start``; a ``start`` at the end computes the last tokens again,
        for their logits.
        """
        granule, grid = self.prompt_granule, self.prompt_grid
        wide = min(self.prefill_chunk, max(granule, grid, width or self.prefill_chunk))
        return list(prompt_runs(min(start, end - 1), end, width=wide, granule=granule, grid=grid))

    def use_adapter(self, slot: int, name: str | None) -> None:
        """From now on compute a slot's rows with the adapter of that name, or (None) the base model alone.

        What is in the slot is another model's then. Raises UserError for a name that isn't loaded.
        """
        self._check_room(slot, 0, 0)
        if name is not None and name not in self.adapters:
            raise unknown_adapter(name, tuple(self.adapters))
        self._adapter[slot] = name

    def prefill(self, slot: int, tokens: Sequence[int] | np.ndarray, start: int) -> np.ndarray:
        """Write rows ``start`` to ``len(tokens)`` of a slot in one run; returns the last token's logits, [vocab].

        tokens: the whole prompt up to the run's end, since rows in front of ``start`` may be computed again; those
        below it are in the cache. Borders are :meth:`prompt_runs`'. Raises UserError for ids outside the vocabulary or
        a prompt that has no room, ValueError for more rows than one run has.
        """
        ids = checked_ids(tokens, self.vocab_size)
        end = len(ids)
        self._check_room(slot, start, end)
        runs = self.prompt_runs(start, end)
        if len(runs) > 1:
            raise ValueError(f"prefill: rows {start} to {end} are {len(runs)} runs; prompt_runs() says which")
        border = runs[0][0]
        first = run_start(border, end, self.prompt_granule)
        padding = lacking(end - first, self.prompt_granule)
        return self._run_prompt(slot, np.append(ids[first:], [0] * padding), first, border, padding)

    def step(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        """Append one token to each of the slots, at row ``starts[i]``; returns logits [len(slots), vocab].

        Any subset of the slots, in any order, each once. Raises UserError for an id outside the vocabulary or a start
        with no room, ValueError for slots that are none or given twice.
        """
        if not slots or len(set(slots)) < len(slots) or not len(slots) == len(tokens) == len(starts):
            raise ValueError(f"step: slots {list(slots)}, {len(tokens)} tokens, {len(starts)} starts: one each, once")
        checked_ids(tokens, self.vocab_size, "a step")
        for slot, start in zip(slots, starts, strict=True):
            self._check_room(slot, start, start + 1)
        return self._run_step(slots, tokens, starts)

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        """The logits behind each of 1 to MAX_RUN tokens of one slot in one run, [len(tokens), vocab].

        Rows from ``start`` on have them then; the next run's start says how many were right. The fillers behind them
        need rows too, so that the run has a multiple of ``prompt_granule``: where the cache ends, take :meth:`step`.
        Raises UserError where there's no room, or for an id outside the vocabulary.
        """
        count = len(tokens)
        if not 1 <= count <= MAX_RUN:
            raise ValueError(f"verify: {count} tokens, expected 1 to {MAX_RUN}")
        checked_ids(tokens, self.vocab_size, "a draft")
        self._check_room(slot, start, start + count + lacking(count, self.prompt_granule))
        return self._run_draft(slot, tokens, start)

    @abstractmethod
    def read_rows(self, slot: int, first: int, end: int) -> np.ndarray:
        """A copy of a slot's rows ``first`` to ``end``: all layers', uint8 [(end - first) * row_bytes].

        Keys and values; the order of bytes is the runner's own: good for :meth:`write_rows` with as many rows, at the
        same ``first``.
        """

    @abstractmethod
    def write_rows(self, slot: int, first: int, block: np.ndarray) -> None:
        """Put what :meth:`read_rows` gave into a slot from row ``first`` on; what is in front stays.

        Raises ValueError for a block that isn't whole rows, or more than have room.
        """

    @abstractmethod
    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Make the first ``rows`` rows of slot ``target`` those of slot ``source``."""

    @abstractmethod
    def release(self, slot: int) -> None:
        """A sequence is done: nothing in its slot is needed any more, and none of it will be moved about."""

    def close(self) -> None:
        """Free graphs and cache. From then on every run raises UserError; closing again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._release()

    def _check_room(self, slot: int, start: int, end: int) -> None:
        if self.closed:
            refuse_closed()
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} is not in 0..{self.slots - 1}")
        if not 0 <= start <= end:
            raise ValueError(f"rows {start} to {end} of slot {slot}: no such range")
        if end > self.max_seq_len:
            raise UserError(f"rows {start} to {end} of slot {slot}: it holds {self.max_seq_len} tokens")

    @abstractmethod
    def _run_prompt(self, slot: int, ids: np.ndarray, first: int, border: int, padding: int) -> np.ndarray:
        """Write tokens, int64 [n], from row ``first`` on; the last ``padding`` are fillers, from row 0 only.

        Rows below ``border`` were there before and keep their bits. Returns the last real token's logits, [vocab].
        """

    @abstractmethod
    def _run_step(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        """What :meth:`step` says, of arguments that are right."""

    @abstractmethod
    def _run_draft(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        """What :meth:`verify` says, of arguments that are right."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what :meth:`close` frees."""


def refuse_closed() -> NoReturn:
    """Raises UserError: for what a closed runner is asked."""
    raise UserError("this engine is closed; load the bundle again")
