"""Many sequences on a TensorRT engine: a step is one run over the first places of a pool, replayed as a CUDA graph.

Never run on a GPU: docs/status.md. Nothing is promised of bits, so ``invariant`` is refused.

There is a captured graph, and the context that it holds, for some numbers of sequences only (1, 2, 4 and so on, up to
the slots): TensorRT-RTX compiles kernels for each, and the others have fillers. A filler runs at a place that may be
somebody's, and writes to that cache's last row, which no sequence gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from glm4runtime.backends.cuda import ALIGNMENT
from glm4runtime.backends.fork import refuse_in_children
from glm4runtime.backends.places import Places
from glm4runtime.backends.pool import DevicePool
from glm4runtime.backends.pooled import PooledRunner
from glm4runtime.backends.runner import MAX_RUN
from glm4runtime.backends.step import cache_shapes, input_shapes, longest_run, most_sequences, profile_for
from glm4runtime.backends.trt_choice import Chosen
from glm4runtime.backends.trt_engine import DeviceEngine, DeviceLogits
from glm4runtime.backends.trt_inputs import StepInputs
from glm4runtime.backends.trt_runs import SequenceRuns
from glm4runtime.contract import DTYPE_BYTES, CacheSpec, Manifest, UserError
from glm4runtime.contract.engine_spec import EngineSpec


class EngineBatchRunner(PooledRunner):
    """A bundle for ``tensorrt`` on one of its engines; each slot's cache has the bundle's whole length always."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        chosen: Chosen,
        *,
        slots: int,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        """Read the engine, allocate caches and buffers, capture a step for every number of sequences that one has.

        prefill_chunk: fewer where the engine's profiles take fewer. Raises UserError for sizes out of range and where
        the device refuses, BundleError for an engine that can't be read or does not serve such runs.
        """
        spec, cache = chosen.spec, manifest.cache
        most = longest_run(spec)
        super().__init__(
            manifest, slots=slots, max_seq_len=max_seq_len, prefill_chunk=min(prefill_chunk, most) if most else 1
        )
        _require_aligned(cache, slots)
        if slots > 1:
            self.max_seq_len = min(self.max_seq_len, cache.max_seq_len - 1)
        draft = min(MAX_RUN, cache.max_seq_len)
        self._many = SequenceRuns(spec, manifest, chunk=self.prefill_chunk, draft=draft)
        self._counts = [*(1 << power for power in range((slots - 1).bit_length())), slots]
        profiles = [profile_for(spec, 1, 1, count) for count in self._counts]
        engine = self._engine = DeviceEngine(folder / spec.file, spec, chosen.module, chosen.cuda)
        self._use_pool(DevicePool(cache, cache.max_seq_len, slots, engine.memory), Places(slots, 1))
        self._step_logits = DeviceLogits(engine, slots, self.vocab_size)
        draft_logits = DeviceLogits(engine, draft, self.vocab_size)
        self._inputs = StepInputs(engine, slots, cache.max_seq_len)
        self._many.allocate(engine)
        engine.reserve_scratch()
        self._at = 0  # the place that prompts and drafts run over
        caches = self._pool.addresses(0)
        self._many.open(draft_logits, caches)
        addresses = {**caches, **self._step_logits.addresses, **self._inputs.addresses}
        refuse_in_children(self, "_run_prompt", "_run_places", "_run_draft")
        chosen.cuda("cudaDeviceSynchronize")  # the stream doesn't wait for what was cleared and copied outside of it
        self._replays: dict[int, Callable[[], None]] = {}
        for count, profile in zip(self._counts, profiles, strict=True):
            context = engine.context(addresses, captured=True)
            run = partial(engine.enqueue, context, self._inputs.upload(count), self._step_logits.download(count))
            shapes = {**input_shapes(1, 1, cache.max_seq_len, count), **cache_shapes(cache, count)}
            self._inputs.fill((), (), count)
            self._replays[count] = engine.captured(context, shapes, profile, run)

    def _release(self) -> None:
        self._engine.close()
        del self._replays, self._many, self._inputs, self._step_logits, self._engine, self._pool

    def _run_prompt(self, slot: int, ids: np.ndarray, first: int, border: int, padding: int) -> np.ndarray:
        self._place(slot, first)
        self._filled[slot] = first + len(ids) - padding
        return self._many.prompt(ids, first, padding)

    def _run_draft(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        self._place(slot, start)
        self._filled[slot] = start + len(tokens)
        return self._many.draft(tokens, start)

    def _run_places(self, slots: Sequence[int], tokens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
        given = len(slots)
        count = next(count for count in self._counts if count >= given)
        self._inputs.fill(tokens, starts, count)
        self._replays[count]()
        self._engine.wait()
        return self._step_logits.array[:given]

    def _place(self, slot: int, rows: int) -> None:
        """Have prompts and drafts run over a slot's place, of which the first rows are needed."""
        self._require_rows(slot, rows)
        place = self._places.place[slot]
        if place != self._at:
            self._at = -1  # until all of it is there: an interrupt may come between
            self._many.use_cache(self._pool.addresses(place))
            self._at = place


def require_batch(spec: EngineSpec, slots: int) -> None:
    """Raise UserError where an engine takes fewer sequences in a step."""
    if (most := most_sequences(spec)) < slots:
        raise UserError(
            f"{spec.file}: was built for steps of {most} sequence{'s' * (most != 1)}, and slots={slots}; build it "
            f"again with `glm4export engine BUNDLE --max-batch {slots}`" + (f", or open slots={most}" * bool(most))
        )


def _require_aligned(cache: CacheSpec, slots: int) -> None:
    """Raise UserError where caches side by side don't begin where TensorRT wants tensors to."""
    row = cache.kv_heads * cache.head_dim * DTYPE_BYTES[cache.dtype]
    if slots > 1 and row * cache.max_seq_len % ALIGNMENT:
        raise UserError(
            f"the bundle's caches of {cache.max_seq_len} rows of {row} bytes can't lie side by side for TensorRT, "
            f"whose addresses are multiples of {ALIGNMENT}; build it with a --max-seq-len that is one"
        )
