"""Prefill and decode graphs in ONNX Runtime, over one cache, everything bound once.

The prefill graph computes steps too, and is the only one that is opened where decode has the same weights and kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.adapters import AdapterPool, Selection
from glm4runtime.backends.cache import Buffer, Cache
from glm4runtime.backends.cuda_graph import CAPTURING, CapturedSteps, require_capture, uncaptured
from glm4runtime.backends.gpu_options import ANY_GPU, GpuOptions
from glm4runtime.backends.graph_check import graphs_to_open, takes_positions
from glm4runtime.backends.held_row import HeldRow, Logits
from glm4runtime.backends.lengths import lengths_of
from glm4runtime.backends.ort_session import device_of
from glm4runtime.backends.runner import MAX_RUN, Runner, refuse_closed
from glm4runtime.backends.stages import HOST, open_graphs
from glm4runtime.backends.top_rows import TopRows, top_count
from glm4runtime.contract import DECODE, INPUT_IDS, LOGIT_ROWS, LOGITS, POSITION_IDS, PREFILL, GraphName, Manifest

# Rows that CUDA's kernel for 8-bit weights takes (kSmallMMax8 in onnxruntime's matmul_8bits.cu); a run of more widens
# every matrix first, and moves five times the bytes. That for 4 bits takes 16, as many as a run may have.
_INT8_ROWS = 5


class OrtRunner(Runner):
    """A bundle for ``cpu`` or ``cuda``: GroupQueryAttention over a cache as long as the session asks for."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str,
        threads: int = 0,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
        adapters: Mapping[str, Path] | None = None,
        gpu: GpuOptions = ANY_GPU,
        cuda_graphs: bool = False,
        sequences: int = 1,
        graphs: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the graphs that are needed and allocate the cache; arguments as :func:`glm4runtime.load`'s.

        sequences: caches that a memory limit must leave room for. graphs: what to run, where it's opened already.

        Raises UserError for sizes out of range or a provider that can't start, BundleError for a damaged graph.
        """
        super().__init__(manifest, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)
        if provider == "cuda" and manifest.precision == "int8":
            self.draft_rows = _INT8_ROWS
        device = self.device = device_of(provider)
        self.gpu = gpu
        self.pool = AdapterPool(manifest, device, adapters, gpu.device_id) if adapters else None
        cache_bytes = manifest.cache.bytes_per_token * self.max_seq_len * sequences
        if cuda_graphs:
            require_capture(manifest)
        stages = manifest.parts(PREFILL).values()
        ids = [gpu.of_stage(index) for index, layers in enumerate(stages) for _ in layers]
        self._cache = Cache(manifest.cache, self.max_seq_len, device, ids)
        # What more than one device reads comes from the host
        place = self.place = HOST if len(gpu.devices) > 1 else (device, gpu.device_id)
        self._lengths = lengths_of(manifest.first(PREFILL), 1, self.max_seq_len, *place)
        self._prompt = Buffer((1, self.prefill_chunk), "int64", *place)
        self._token = Buffer((1, 1), "int64", *place)
        self._draft = Buffer((1, MAX_RUN), "int64", *place)
        self._logits = Buffer((1, MAX_RUN, manifest.vocab_size), "float32", "cpu")  # rows not used cost no memory
        self._rows = Buffer((1, MAX_RUN), "int64", *place)  # a run's rows in order: all of a draft's, a step's one
        self._rows.write(np.arange(MAX_RUN)[None])
        self._last = Buffer((1, 1), "int64", *place)
        width = max(self.prefill_chunk, MAX_RUN) if takes_positions(manifest.first(PREFILL)) else 0
        self._positions = Buffer((1, width), "int64", *place) if width else None
        self._graphs = dict(graphs or {}) or open_graphs(
            folder,
            manifest,
            graphs_to_open(folder, manifest),
            provider=provider,
            threads=threads,
            gpu=gpu,
            cache_bytes=cache_bytes,
            options=CAPTURING if cuda_graphs else {},
        )
        self._prefill, self._decode = self._graphs[PREFILL], self._graphs[self.step_graph]
        self._prefill_binding, self._decode_binding = self._prefill.io_binding(), self._decode.io_binding()
        self._verify_binding = self._decode.io_binding()
        self._bind_cache: Callable[[Any], None] = self._cache.bind
        self._over_cache: set[Any] = set()  # bindings that are over it
        for binding in (self._prefill_binding, self._decode_binding, self._verify_binding):
            self._logits.bind_output(binding, LOGITS, (1, 1, manifest.vocab_size))
            self._lengths.bind(binding, 1)
        self._token.bind_input(self._decode_binding, INPUT_IDS)
        self._last.bind_input(self._prefill_binding, LOGIT_ROWS)
        self._chooses = self.step_graph == PREFILL
        if self._chooses:
            self._rows.bind_input(self._decode_binding, LOGIT_ROWS, (1, 1))
        self._row: np.ndarray = self._logits.array[0, 0]  # [vocab]
        self.top_count = top_count(manifest.first(self.step_graph))
        self._top = TopRows(self.top_count, MAX_RUN, self._logits, *place) if self.top_count else None
        self.run_options = uncaptured() if cuda_graphs else None
        self._captured = CapturedSteps(1, manifest.vocab_size, gpu.device_id, self.top_count) if cuda_graphs else None
        if self._captured is not None:
            self._launch = self._captured.bind(self._decode_binding, device)
        self._selections: dict[str | None, Selection] = {}
        self._selection: Selection | None = None
        self._over_adapter: set[Any] = set()  # bindings that have it

    @property
    def adapters(self) -> tuple[str, ...]:
        return () if self.pool is None else self.pool.names

    def _bind_adapter(self, name: str | None) -> None:
        assert self.pool is not None, "there is no adapter to change to, or from"
        self._over_adapter.clear()
        if name not in self._selections:
            self._selections[name] = self.pool.select([name])
        self._selection = self._selections[name]

    @property
    def cache(self) -> Cache:
        """The sequence's keys and values."""
        return self._cache

    def cache_bits(self, rows: int) -> list[bytes]:
        return self._cache.bits(rows)

    def cache_clipped(self) -> float | None:
        return self._cache.clipped(self.length)

    def use_cache(self, bind: Callable[[Any], None]) -> None:
        """Run over the cache that ``bind`` binds; the runner's own, and what it told of it, is given up.

        It has the bundle's shape but for its length, [1, kv_heads, any, head_dim].
        """
        self.__dict__.pop("_cache", None)
        self._bind_cache = bind
        self._over_cache.clear()

    @property
    def graphs(self) -> dict[str, Any]:
        """The onnxruntime sessions of the graphs that are open, by name, for runs over a cache of one's own.

        In a bundle of stages each is a :class:`glm4runtime.backends.stages.StagedGraph`.
        """
        return self._graphs

    @property
    def step_graph(self) -> GraphName:
        """The name of the graph that computes steps and drafts: ``decode`` where both are open."""
        return DECODE if DECODE in self._graphs else PREFILL

    def _release(self) -> None:
        del self._prefill_binding, self._decode_binding, self._verify_binding, self._prefill, self._decode, self._graphs
        self.use_cache(refuse_closed)
        del self._prompt, self._token, self._draft, self._logits, self._row
        del self._rows, self._last, self._positions, self._selection, self._selections, self._lengths
        self.pool = self._top = None
        if self._captured is not None:
            del self._launch
            self._captured.close()

    def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        binding, count = self._prefill_binding, len(ids)
        self._prompt.host[0, :count] = ids
        self._prompt.upload()
        self._prompt.bind_input(binding, INPUT_IDS, (1, count))
        self._last.host[0, 0] = count - 1 - padding
        self._last.upload()
        # Padding from row 0 only: the graph takes a past's length for what is left of the run
        self._lengths.tell(binding, [start + count - padding], start + count)
        self._bind_positions(binding, start, count)
        self._run(self._prefill, binding)
        return self._row

    def _run_token(self, token: int, start: int) -> Logits:
        self._token.host[0, 0] = token
        self._token.upload()
        if self._captured is not None:
            # The total is captured, so it's the most that it'll ever be
            self._lengths.tell(self._decode_binding, [start + 1], self.max_seq_len)
            self._over(self._decode_binding)
            self._launch(self._decode)
            return self._captured.hold() if self._holding and self._top is not None else self._captured.fetch()[0]
        self._lengths.tell(self._decode_binding, [start + 1], start + 1)
        self._bind_positions(self._decode_binding, start, 1)
        if self._top is not None:
            self._top.bind(self._decode_binding, 1, hold=self._holding)
        self._run(self._decode, self._decode_binding)
        return self._top.rows(1)[0] if self._top is not None and self._holding else self._row

    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray | list[HeldRow]:
        binding, count = self._verify_binding, len(tokens)
        self._draft.host[0, :count] = tokens
        self._draft.upload()
        self._draft.bind_input(binding, INPUT_IDS, (1, count))
        self._lengths.tell(binding, [start + count], start + count)
        self._bind_positions(binding, start, count)
        if self._chooses:
            self._rows.bind_input(binding, LOGIT_ROWS, (1, count))
        if self._top is not None:
            self._top.bind(binding, count, hold=self._holding)
        else:
            self._logits.bind_output(binding, LOGITS, (1, count, self.manifest.vocab_size))
        self._run(self._decode, binding)
        if self._top is not None and self._holding:
            return self._top.rows(count)
        rows: np.ndarray = self._logits.array[0, :count]
        return rows

    def _run(self, session: Any, binding: Any) -> None:
        self._over(binding)
        session.run_with_iobinding(binding, self.run_options)

    def _over(self, binding: Any) -> None:
        """Have a binding over the cache."""
        if binding not in self._over_cache:
            self._bind_cache(binding)
            self._over_cache.add(binding)
        if self._selection is not None and binding not in self._over_adapter:
            self._selection.bind(binding)
            self._over_adapter.add(binding)

    def _bind_positions(self, binding: Any, start: int, count: int) -> None:
        """Where a run's tokens stand, for graphs that are told."""
        if self._positions is None:
            return
        self._positions.host[0, :count] = np.arange(start, start + count)
        self._positions.upload()
        self._positions.bind_input(binding, POSITION_IDS, (1, count))
