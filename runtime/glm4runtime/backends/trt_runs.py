"""Prompts and drafts of one sequence on a TensorRT engine: runs whose shapes change, on a context of their own.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from glm4runtime.backends.step import cache_shapes, input_shapes, profiles_for
from glm4runtime.backends.trt_engine import DeviceEngine, DeviceLogits
from glm4runtime.backends.trt_inputs import SequenceInputs
from glm4runtime.contract import Manifest
from glm4runtime.contract.engine_spec import EngineSpec


class SequenceRuns:
    """Runs of 1 to ``chunk`` prompt tokens, and of 1 to ``draft`` tokens with logits of each, over one cache."""

    def __init__(self, spec: EngineSpec, manifest: Manifest, *, chunk: int, draft: int) -> None:
        """Raises BundleError for an engine whose profiles don't serve them."""
        self._profiles = profiles_for(spec, chunk, every_row=False)
        self._draft_profiles = profiles_for(spec, draft, every_row=True)
        self._cache, self._max_seq = cache_shapes(manifest.cache), manifest.cache.max_seq_len
        self._width, self._rows = max(chunk, draft), draft

    def allocate(self, engine: DeviceEngine) -> None:
        """Make the inputs, before the engine's scratch memory is."""
        self._engine = engine
        self._inputs = SequenceInputs(engine, self._width, self._rows, self._max_seq)

    def open(self, logits: DeviceLogits, cache: Mapping[str, int]) -> None:
        """Make the context. cache: addresses of its tensors by name."""
        addresses = {**cache, **logits.addresses, **self._inputs.addresses}
        self._logits = logits
        self._context = self._engine.context(addresses, captured=False)

    def use_cache(self, addresses: Mapping[str, int]) -> None:
        """From now on run over another cache."""
        self._context.place(addresses)

    def prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        """What :meth:`Runner._run_prompt` says."""
        row: np.ndarray = self._run(ids, start, 1, self._profiles, padding=padding)[0]
        return row

    def draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """What :meth:`Runner._run_draft` says."""
        return self._run(tokens, start, len(tokens), self._draft_profiles, every_row=True)

    def _run(
        self,
        tokens: Sequence[int] | np.ndarray,
        start: int,
        rows: int,
        profiles: list[int],
        *,
        every_row: bool = False,
        padding: int = 0,
    ) -> np.ndarray:
        count = len(tokens)
        self._inputs.fill(tokens, start, every_row=every_row, padding=padding)
        self._context.shape({**input_shapes(count, rows, self._max_seq), **self._cache}, profiles[count - 1])
        self._engine.enqueue(self._context, self._inputs.upload, self._logits.download(rows))
        self._engine.wait()
        return self._logits.array[:rows]
