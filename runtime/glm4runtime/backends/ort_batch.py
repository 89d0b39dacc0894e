"""Prefill and decode graphs in ONNX Runtime over the caches of many sequences.

Prompts and drafts are runs of one sequence, as a session's; a step is one run over the first places of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.adapters import Selection
from glm4runtime.backends.cache import Buffer
from glm4runtime.backends.cuda import Memory, open_cuda
from glm4runtime.backends.cuda_graph import CapturedSteps
from glm4runtime.backends.gpu_options import ANY_GPU, GpuOptions
from glm4runtime.backends.graph_check import takes_positions
from glm4runtime.backends.invariance import find_batch_granule, find_granule, require_granule
from glm4runtime.backends.lengths import lengths_of
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.backends.places import Places
from glm4runtime.backends.pool import DevicePool, HostPool, Pool, SplitPool
from glm4runtime.backends.pooled import PooledRunner
from glm4runtime.backends.prompt_runs import lacking
from glm4runtime.contract import INPUT_IDS, LOGIT_ROWS, LOGITS, PREFILL, Manifest, UserError

_BUCKET = 256  # tokens: masks of a step get wider by as many, and are seldom bound again
_Kind = tuple[int, bool]  # of steps: how many rows, and whether some of them use adapters
_SPARE = 1  # places of nobody that a memory limit reckons with: the granule is 2 on every machine seen
_MEASURED = (48, 31, 16, 5, 40, 23, 9, 1)  # tokens in front of the steps that are compared


class OrtBatchRunner(PooledRunner):
    """A bundle for ``cpu`` or ``cuda``.

    Graphs built with ``--position-ids`` append to every sequence of a run at one row, so theirs run one by one.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        slots: int,
        provider: str,
        threads: int = 0,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
        invariant: bool = True,
        adapters: Mapping[str, Path] | None = None,
        gpu: GpuOptions = ANY_GPU,
        cuda_graphs: bool = False,
    ) -> None:
        """Open the graphs, measure the granules where ``invariant``, and allocate the caches.

        adapters: files of ``glm4export adapter`` by the names that :meth:`use_adapter` takes. cuda_graphs: capture a
        step for each number of rows that one has, when it's first run.

        Raises UserError for sizes out of range, a provider that can't start, caches for which there's no memory, and
        where bits depend on the run whatever its width; BundleError for a damaged graph.
        """
        super().__init__(manifest, slots=slots, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)
        self._lane = OrtRunner(
            folder,
            manifest,
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk,
            adapters=adapters,
            gpu=gpu,
            cuda_graphs=cuda_graphs,
            sequences=slots + (_SPARE if invariant else 0),
        )
        if self._lane.pool is not None:
            self.adapters = self._lane.pool.hashes
        self._one_by_one = takes_positions(manifest.first(PREFILL))
        if invariant:
            self._measure()
        if gpu.mem_limit is not None and (spare := self.granule - 1) > _SPARE:
            raise UserError(
                f"gpu_mem_limit: invariant steps take multiples of {self.granule} sequences on this GPU, and the limit "
                f"leaves room for {_SPARE} cache more than slots, not {spare}; leave it out, or load without invariant"
            )
        widest = self._lane.draft_rows
        self.draft_rows = max(1, widest - widest % self.prompt_granule)  # fillers included
        self._lane.use_cache(_refuse_unplaced)
        self._at: int | None = None  # the place that the lane's runs are over
        places, rows = Places(slots, self.granule), self.max_seq_len
        if self._one_by_one:
            self.max_seq_len -= self.prompt_granule - 1  # a step at the end has fillers behind it
        self._use_pool(self._new_pool(rows, places.count), places)
        self._captured: CapturedSteps | None = None
        if cuda_graphs:
            self._captured = CapturedSteps(places.count, self.vocab_size, gpu.device_id)
        self._steps = None if self._one_by_one else _Steps(self._lane, self._pool, self._captured)

    def _release(self) -> None:
        self._lane.close()
        self._steps = None
        if self._captured is not None:
            self._captured.close()
        self._pool.close()

    def _run_prompt(self, slot: int, ids: np.ndarray, first: int, border: int, padding: int) -> np.ndarray:
        self._require_rows(slot, first)
        self._filled[slot] = max(border, first + len(ids) - padding)
        place = self._place_lane(slot)
        kept = self._pool.read(place, first, border) if self.prompt_grid > self.prompt_granule else None
        try:
            return self._lane._run_prompt(ids, first, padding)
        finally:
            if kept is not None:  # this run computes them otherwise than theirs did
                self._pool.write(place, first, kept)

    def _run_draft(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        fillers = lacking(len(tokens), self.prompt_granule)
        self._require_rows(slot, start)
        self._filled[slot] = start + len(tokens)
        self._place_lane(slot)
        rows = self._lane._run_draft([*tokens, *[tokens[-1]] * fillers], start)
        assert isinstance(rows, np.ndarray)  # the engine fetches all
        return rows[: len(tokens)]

    def _run_step(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        if not self._one_by_one:
            return super()._run_step(slots, tokens, starts)
        for row, slot in enumerate(slots):
            self._logits[row] = self._run_draft(slot, tokens[row : row + 1], starts[row])[0]
        return self._logits[: len(slots)]

    def _run_places(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        assert self._steps is not None
        fillers = [0] * (self._places.rows(len(slots)) - len(slots))
        adapters = [*(self._adapter[slot] for slot in slots), *(None for _ in fillers)]
        return self._steps.run([*tokens, *fillers], [*starts, *fillers], adapters)[: len(slots)]

    def _place_lane(self, slot: int) -> int:
        """Have the lane's runs over a slot's place, with its adapter; returns the place."""
        self._lane.use_adapter(self._adapter[slot])
        place = self._places.place[slot]
        if place != self._at:
            self._lane.use_cache(partial(self._pool.bind, first=place, count=1))
            self._at = place
        return place

    def _new_pool(self, max_seq_len: int, places: int) -> Pool:
        spec = self.manifest.cache
        gpu, stages = self._lane.gpu, self.manifest.stages
        if self._lane.device == "cpu":
            return HostPool(spec, max_seq_len, places)
        if stages is not None and len(gpu.devices) > 1:
            return SplitPool(spec, max_seq_len, places, open_cuda("gpu"), list(zip(stages, gpu.stages, strict=True)))
        return DevicePool(spec, max_seq_len, places, Memory(open_cuda("gpu")), gpu.device_id)

    def _measure(self) -> None:
        """Set both granules; the lane's own cache is given up."""
        sizes = {"max_seq_len": self.max_seq_len, "prefill_chunk": self.prefill_chunk}
        named: list[str | None] = [*self._lane.adapters] or [None]  # runs that use them must agree too
        self._lane.use_adapter(named[0])
        self.prompt_granule = require_granule(find_granule(self._lane), **sizes)
        self.max_seq_len -= self.max_seq_len % self.prompt_granule
        self.invariant = True
        if self._one_by_one:
            return
        lengths = [min(length, self.max_seq_len - 1) for length in _MEASURED]
        widest = self.slots + lacking(self.slots, len(_MEASURED))
        pool = self._new_pool(max(lengths) + 1, widest + 1)  # the last place has what all begin with
        self._lane.use_cache(partial(pool.bind, first=widest, count=1))
        rng = np.random.default_rng(0)
        tokens: list[int] = rng.integers(0, self.vocab_size, max(lengths) + len(lengths)).tolist()
        if max(lengths):
            self._lane.prefill(tokens[: max(lengths)])
        steps = _Steps(self._lane, pool)

        def step(sequences: Sequence[int]) -> list[bytes]:
            starts = [lengths[sequence] for sequence in sequences]
            for place, start in enumerate(starts):
                pool.copy(widest, place, 0, start)
            used = [named[sequence % len(named)] for sequence in sequences]
            logits = steps.run([tokens[-1 - sequence] for sequence in sequences], starts, used)
            written = (pool.read(place, start, start + 1) for place, start in enumerate(starts))
            return [row.tobytes() + own.tobytes() for row, own in zip(logits, written, strict=True)]

        self.granule = require_granule(find_batch_granule(step, len(lengths), widest))
        pool.close()


class _Steps:
    """Runs of one token for each of the first places of a pool.

    There is a binding for each number of them, and another one where some use adapters: those read all that are loaded.
    """

    def __init__(self, lane: OrtRunner, pool: Pool, captured: CapturedSteps | None = None) -> None:
        """captured: has each binding's runs captured; None in a session that captures others runs them without."""
        self._captured, self._options = captured, lane.run_options
        self._launches: dict[_Kind, Callable[[Any], None]] = {}
        self._session, self._pool, self._adapters = lane.graphs[lane.step_graph], pool, lane.pool
        self._chooses = lane.step_graph == PREFILL
        place, places = lane.place, pool.places
        self._tokens = Buffer((places, 1), "int64", *place)
        self._rows = Buffer((places, 1), "int64", *place)  # zeros: the one row that there is
        self._rows.clear()
        self._logits = Buffer((places, 1, lane.manifest.vocab_size), "float32", "cpu")
        self._lengths = lengths_of(lane.manifest.first(lane.step_graph), places, pool.max_seq_len, *place)
        self._bindings: dict[_Kind, Any] = {}
        self._selections: dict[int, Selection] = {}  # by the number of rows

    def run(self, tokens: Sequence[int], starts: Sequence[int], adapters: Sequence[str | None]) -> np.ndarray:
        """Append a token at each place, at row ``starts[place]``; returns logits float32 [len(tokens), vocab]."""
        kind = count, adapted = len(tokens), any(name is not None for name in adapters)
        binding = self._bindings.get(kind) or self._bind(kind)
        if adapted:
            self._selections[count].choose(adapters)
        self._tokens.host[:count, 0] = tokens
        self._tokens.upload()
        lengths = [start + 1 for start in starts]
        self._lengths.tell(binding, lengths, self._width(lengths))
        if self._captured is not None:
            self._launches[kind](self._session)
            return self._captured.fetch(count)
        self._session.run_with_iobinding(binding, self._options)
        rows: np.ndarray = self._logits.array[:count, 0]
        return rows

    def _width(self, lengths: list[int]) -> int:
        """Rows that a step looks at: wider than the longest sequence changes no bit; a captured one has them all."""
        if self._captured is not None:
            return self._pool.max_seq_len
        return min(-(-max(lengths) // _BUCKET) * _BUCKET, self._pool.max_seq_len)

    def _bind(self, kind: _Kind) -> Any:
        binding, (count, adapted) = self._session.io_binding(), kind
        if adapted and self._adapters is not None:
            self._selections[count] = self._adapters.every(count)
            self._selections[count].bind(binding)
        self._pool.bind(binding, 0, count)
        self._tokens.bind_input(binding, INPUT_IDS, (count, 1))
        if self._chooses:
            self._rows.bind_input(binding, LOGIT_ROWS, (count, 1))
        self._lengths.bind(binding, count)
        if self._captured is not None:
            self._launches[kind] = self._captured.bind(binding, self._pool.device, count)
        else:
            self._logits.bind_output(binding, LOGITS, (count, 1, self._logits.shape[2]))
        self._bindings[kind] = binding
        return binding


def _refuse_unplaced(_: Any) -> None:
    raise AssertionError("a run before its slot has a place")
