"""A session on a TensorRT engine: everything on the device, allocated once; decode steps replay a CUDA graph.

Never run on a GPU: docs/status.md.

A captured graph holds its execution context's state, so NVIDIA asks for one context per graph, with scratch memory
shared between contexts ("Inference with CUDA Graphs" in TensorRT-RTX's performance guide). Hence two: ``token`` for
decode steps, captured, and one for prompts and drafts, whose shapes change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from glm4runtime.backends.cuda import Memory
from glm4runtime.backends.fork import refuse_in_children
from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.backends.step import cache_shapes, input_shapes, longest_run, profile_for
from glm4runtime.backends.trt_choice import Chosen
from glm4runtime.backends.trt_engine import DeviceEngine, DeviceLogits
from glm4runtime.backends.trt_inputs import SequenceInputs
from glm4runtime.backends.trt_runs import SequenceRuns
from glm4runtime.contract import DTYPE_BYTES, Manifest, past_name, present_name


class EngineRunner(Runner):
    """A bundle for ``tensorrt`` on one of its engines. The cache has the bundle's whole length always."""

    device = "cuda"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        chosen: Chosen,
        *,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        """Read the engine, allocate cache and buffers, capture the decode step.

        prefill_chunk: fewer where the engine's profiles take fewer. Raises UserError where the device refuses,
        BundleError for an engine that can't be read or does not serve the runs of a session.
        """
        spec = chosen.spec
        most = longest_run(spec)
        super().__init__(manifest, max_seq_len=max_seq_len, prefill_chunk=min(prefill_chunk, most) if most else 1)
        draft = min(MAX_RUN, manifest.cache.max_seq_len)
        self._many = SequenceRuns(spec, manifest, chunk=self.prefill_chunk, draft=draft)
        profile = profile_for(spec, 1, 1)
        engine = self._engine = DeviceEngine(folder / spec.file, spec, chosen.module, chosen.cuda)
        cache = _allocate_cache(engine.memory, manifest)
        self._logits = DeviceLogits(engine, draft, manifest.vocab_size)
        limit = manifest.cache.max_seq_len
        self._token = SequenceInputs(engine, 1, 1, limit)
        self._many.allocate(engine)
        engine.reserve_scratch()
        context = engine.context({**cache, **self._logits.addresses, **self._token.addresses}, captured=True)
        self._many.open(self._logits, cache)
        refuse_in_children(self, "_run_prompt", "_run_token", "_run_draft")
        chosen.cuda("cudaDeviceSynchronize")  # the stream doesn't wait for what was cleared and copied outside of it
        run = partial(engine.enqueue, context, self._token.upload, self._logits.download(1))
        self._token.fill((0,), 0)  # the first prompt overwrites the row
        shapes = {**input_shapes(1, 1, limit), **cache_shapes(manifest.cache)}
        self._replay: Callable[[], None] = engine.captured(context, shapes, profile, run)

    def _release(self) -> None:
        self._engine.close()
        del self._replay, self._token, self._many, self._logits, self._engine

    def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        return self._many.prompt(ids, start, padding)

    def _run_token(self, token: int, start: int) -> np.ndarray:
        self._token.fill((token,), start)
        self._replay()
        self._engine.wait()
        row: np.ndarray = self._logits.array[0]
        return row

    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
        return self._many.draft(tokens, start)


def _allocate_cache(memory: Memory, manifest: Manifest) -> dict[str, int]:
    """Addresses of the cache's inputs and outputs: past and present of a layer at the same one."""
    cache, addresses = manifest.cache, {}
    size = cache.kv_heads * cache.max_seq_len * cache.head_dim * DTYPE_BYTES[cache.dtype]
    for layer in range(cache.layers):
        for part in ("key", "value"):
            address = memory.device(size, "the cache")
            addresses[past_name(layer, part)] = addresses[present_name(layer, part)] = address
    return addresses
