"""LoRA adapters in memory, and choosing one for each sequence of a run.

Every A and B of the graph has one buffer, in which an adapter takes a slot of ``rank`` rows. A run binds the rows from
the first slot that it uses to the last one, by address: nothing is copied when adapters change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.cache import Buffer
from glm4runtime.backends.runner import unknown_adapter
from glm4runtime.contract import (
    DECODE,
    LORA,
    LORA_GATE,
    LORA_MODULES,
    LORA_QKV_GATE,
    AdapterFile,
    Manifest,
    TensorSpec,
    UserError,
    lora_module,
    shown,
)

_GATES = {LORA_GATE: 1, LORA_QKV_GATE: LORA_MODULES["qkv_proj"]}


class Selection:
    """Which adapter each sequence of a run uses, ready to be bound. It must live as long as it is bound."""

    def __init__(
        self, pool: AdapterPool, names: Sequence[str | None], among: Sequence[str | None] | None = None
    ) -> None:
        """names: one for each sequence, in the order of the batch; None for the base model. among: those whose rows are
        bound, by default the names.
        """
        used = [slot for name in (names if among is None else among) if (slot := pool.slot(name)) is not None]
        self._pool, self._first = pool, min(used, default=0)
        last = max(used, default=0)
        self._rows = (last - self._first) * pool.spec.rank + pool.ranks[last] if used else 0
        self._gates = {
            name: Buffer((len(names), 1, max(1, fused * self._rows)), pool.dtype, *pool.place)
            for name, fused in _GATES.items()
        }
        self._names: tuple[str | None, ...] = ()
        self.choose(names)

    def choose(self, names: Sequence[str | None]) -> None:
        """Use these from now on, of those whose rows are bound; as many as before. It needn't be bound again."""
        chosen = tuple(names)
        if chosen == self._names:
            return
        self._names = ()  # until all is written: an interrupt may come between
        pool = self._pool
        for name, gate in self._gates.items():
            fused = _GATES[name]
            gate.host[...] = 0
            for row, slot in enumerate(map(pool.slot, chosen)):
                if slot is not None:
                    start = fused * pool.spec.rank * (slot - self._first)
                    gate.host[row, :, start : start + fused * pool.ranks[slot]] = pool.one
            gate.upload()
        self._names = chosen

    def bind(self, binding: Any) -> None:
        """Bind it to a run of as many sequences as there are names."""
        for name, gate in self._gates.items():
            gate.bind_input(binding, name, (gate.shape[0], 1, _GATES[name] * self._rows))
        for name in self._pool.buffers:
            self._pool.bind(binding, name, self._first, self._rows)


class AdapterPool:
    """The adapters of a session, each in a slot of its own."""

    def __init__(self, manifest: Manifest, device: str, adapters: Mapping[str, Path], device_id: int = 0) -> None:
        """adapters: files of ``glm4export adapter`` by the names that requests call them.

        Raises UserError for more of them than slots, for a rank above the bundle's, another base model, linears or
        sizes that the bundle hasn't, and numbers that its dtype doesn't hold; BundleError for a damaged file.
        """
        assert manifest.lora is not None, "open_runner refuses adapters for such bundles"
        self.spec = manifest.lora
        if len(adapters) > self.spec.slots:
            raise UserError(
                f"{len(adapters)} adapters ({', '.join(map(str, adapters))}), and the bundle was built for "
                f"{self.spec.slots}; load fewer, or build it with --lora-slots {len(adapters)}"
            )
        inputs = {spec.name: spec for spec in manifest.graphs[DECODE].inputs if spec.name.startswith(LORA)}
        self.place, self.dtype = (device, device_id), inputs[LORA_GATE].dtype
        self.one = _stored(np.ones(1, np.float32), self.dtype)[0]  # what a gate holds for a row that is used
        self.buffers = {name: self._buffer(spec) for name, spec in inputs.items() if name not in _GATES}
        self.ranks: list[int] = []
        self.hashes: dict[str, str] = {}  # sha256 of what each adapter holds, by its name
        self._slots: dict[str, int] = {}
        for name, path in adapters.items():
            file = AdapterFile.read(path)
            self._load(file, manifest, len(self.ranks))
            self._slots[name], self.hashes[name] = len(self.ranks) - 1, file.sha256
        for buffer in self.buffers.values():
            buffer.upload()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of their slots."""
        return tuple(self._slots)

    def slot(self, name: str | None) -> int | None:
        """The slot of an adapter; None of the base model. Raises UserError for a name that isn't known."""
        if name is None:
            return None
        if name not in self._slots:
            raise unknown_adapter(name, self.names)
        return self._slots[name]

    def select(self, names: Sequence[str | None]) -> Selection:
        """One name, or None for the base model, for each sequence of a run. Raises UserError for one not known."""
        return Selection(self, names)

    def every(self, count: int) -> Selection:
        """The rows of all adapters for runs of ``count`` sequences, which then :meth:`Selection.choose`.

        Products over as many rows whoever uses them add in one order: a sequence's bits are the same in any company.
        """
        return Selection(self, [None] * count, self.names)

    def bind(self, binding: Any, name: str, first: int, rows: int) -> None:
        """Bind an input A or B from slot ``first`` on; ``rows`` of one projection."""
        buffer, fused = self.buffers[name], LORA_MODULES[lora_module(name)]
        start = first * fused * self.spec.rank
        buffer.bind_rows(binding, name, start, fused * rows)

    def _buffer(self, spec: TensorSpec) -> Buffer:
        rows = self.spec.slots * self.spec.rank * LORA_MODULES[lora_module(spec.name)]
        return Buffer((rows, int(spec.dims[1])), spec.dtype, *self.place)

    def _load(self, file: AdapterFile, manifest: Manifest, slot: int) -> None:
        base = manifest.source.get("fingerprint")
        if file.base != base:
            raise UserError(
                f"{file.path}: made for a base model of fingerprint {shown(file.base)}, the bundle's is {shown(base)}; "
                "make it for this bundle with `glm4export adapter`"
            )
        if file.rank > self.spec.rank:
            raise UserError(
                f"{file.path}: its rank is {file.rank}, the bundle was built for up to {self.spec.rank}; build it with "
                f"--lora-rank {file.rank}"
            )
        for name, (shape, at) in file.tensors.items():
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape[1] != shape[1]:
                has = "none of that name" if buffer is None else f"one of {buffer.shape[1]}"
                raise UserError(
                    f"{file.path}: {name} is {shape[1]} wide, and the bundle has {has}; make it for this bundle with "
                    "`glm4export adapter`"
                )
            start = slot * self.spec.rank * LORA_MODULES[lora_module(name)]
            data = np.fromfile(file.path, "<f4", shape[0] * shape[1], offset=at).reshape(shape)
            if name.endswith(".B"):
                data[:, self.spec.scaled_from(lora_module(name), shape[1]) :] *= np.float32(self.spec.branch_scale)
            kept = _stored(data, self.dtype)
            if not np.isfinite(data).all() or (self.dtype == "float16" and not np.isfinite(kept).all()):
                raise UserError(f"{file.path}: {name} holds a number that {self.dtype} doesn't; train it again")
            buffer.host[start : start + shape[0]] = kept
        self.ranks.append(file.rank)


def _stored(data: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers as a buffer of ``dtype`` keeps them: bfloat16 in 16 bits, rounded to the nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(data).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return data.astype(dtype)
