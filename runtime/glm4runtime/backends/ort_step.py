"""A step graph in ONNX Runtime: any provider runs it, ``cpu`` without a GPU.

Only ``cpu`` has ever run: docs/status.md. There the mask is changed in place, cell by cell. On a device a run uploads
its rows of the mask whole, ``max_seq_len`` bytes per row, since ONNX Runtime offers no smaller copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime.backends.cache import Buffer, Cache
from glm4runtime.backends.gpu_options import ANY_GPU, GpuOptions
from glm4runtime.backends.ort_session import device_of, open_session
from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.backends.side_by_side import side_by_side
from glm4runtime.backends.step import RunInputs, Staircase, cache_shapes, fill_band, input_shapes
from glm4runtime.contract import ATTENTION_MASK, LOGITS, STEP, CacheSpec, Manifest
from glm4runtime.folder.layout import ORT_CACHES

_PREFIXES = {"tensorrt": "trt", "tensorrt-rtx": "nv"}  # of the names of their options


class OrtStepRunner(Runner):
    """A bundle for ``tensorrt``, its graph run by ONNX Runtime. The cache has the bundle's whole length always."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str,
        threads: int = 0,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
        gpu: GpuOptions = ANY_GPU,
    ) -> None:
        """Open the graph and allocate the cache; arguments as :func:`glm4runtime.load`'s.

        Raises UserError for sizes out of range or a provider that can't start, BundleError for a damaged graph.
        """
        super().__init__(manifest, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)
        device = self.device = device_of(provider)
        longest = max(self.prefill_chunk, min(MAX_RUN, manifest.cache.max_seq_len))
        options = provider_options(folder, manifest.cache, provider, longest, gpu)
        path = folder / manifest.graphs[STEP].file
        (self._step,) = side_by_side([partial(open_session, path, provider, threads, options=options)])
        self._place = device, gpu.device_id
        self._cache = Cache(manifest.cache, manifest.cache.max_seq_len, device, [gpu.device_id] * manifest.cache.layers)
        if device != "cpu":
            self._cache.clear()
        self._logits = Buffer((1, MAX_RUN, manifest.vocab_size), "float32", "cpu")  # rows not used cost no memory
        self._prompt = self._kind(self.prefill_chunk, 1)
        self._token = self._kind(1, 1)
        self._draft = self._kind(MAX_RUN, MAX_RUN)
        self._row: np.ndarray = self._logits.array[0, 0]  # [vocab]

    def cache_bits(self, rows: int) -> list[bytes]:
        return self._cache.bits(rows)

    def cache_clipped(self) -> float | None:
        return self._cache.clipped(self.length)

    def _release(self) -> None:
        del self._prompt, self._token, self._draft, self._step, self._cache, self._logits, self._row

    def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        self._prompt.run(ids, start, padding=padding)
        return self._row

    def _run_token(self, token: int, start: int) -> np.ndarray:
        self._token.run((token,), start)
        return self._row

    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
        self._draft.run(tokens, start, every_row=True)
        rows: np.ndarray = self._logits.array[0, : len(tokens)]
        return rows

    def _kind(self, width: int, rows: int) -> _Kind:
        width = min(width, self.manifest.cache.max_seq_len)
        return _Kind(self._step, self._cache, self._logits, width, rows, self._place)


class _Kind:
    """One kind of run: its input buffers, and a binding of them, the cache and the logits."""

    def __init__(
        self, session: Any, cache: Cache, logits: Buffer, width: int, rows: int, place: tuple[str, int]
    ) -> None:
        """place: the device's name and id."""
        self._session, self._logits, self._max_seq = session, logits, cache.max_seq_len
        self._binding = session.io_binding()
        self._bound = (0, 0)  # tokens and rows of logits that the binding is for
        self._buffers: dict[str, Buffer] = {}

        def allocate(name: str, shape: tuple[int, ...]) -> np.ndarray:
            self._buffers[name] = Buffer(shape, "int64", *place)
            return self._buffers[name].host

        self._inputs = RunInputs(width, rows, allocate)
        mask = self._buffers[ATTENTION_MASK] = Buffer((1, 1, width, self._max_seq), "bool", *place)
        self._stairs = Staircase(width, self._max_seq, fill_band(mask.host))
        mask.host[0, 0] = self._stairs.first()
        cache.bind(self._binding)

    def run(self, tokens: Sequence[int] | np.ndarray, start: int, *, every_row: bool = False, padding: int = 0) -> None:
        """Write the tokens into the cache from row ``start``, and every one's logits or the last's before padding."""
        count = len(tokens)
        self._inputs.fill(tokens, start, every_row=every_row, padding=padding)
        self._stairs.move(start, count)
        for buffer in self._buffers.values():
            buffer.upload()
        self._bind(count, count if every_row else 1)
        self._session.run_with_iobinding(self._binding)

    def _bind(self, count: int, rows: int) -> None:
        if self._bound != (count, rows):
            self._bound = 0, 0  # until all is bound: an interrupt may come between
            for name, shape in input_shapes(count, rows, self._max_seq).items():
                self._buffers[name].bind_input(self._binding, name, shape)
            self._logits.bind_output(self._binding, LOGITS, (1, rows, self._logits.shape[2]))
            self._bound = count, rows


def provider_options(
    folder: Path, cache: CacheSpec, provider: str, longest: int, gpu: GpuOptions = ANY_GPU
) -> Mapping[str, str]:
    """Options of ONNX Runtime's provider for the step graph, runs of 1 to ``longest`` tokens.

    The TensorRT providers build engines of their own when a graph is opened: from the ranges of its dynamic dims, as
    ``name:1x2,name:3``, and they keep what they built in the bundle, where that can be written.
    """
    if provider == "cuda":
        return gpu.cuda(cache.bytes_per_token * cache.max_seq_len)
    prefix = _PREFIXES.get(provider)
    if prefix is None:
        return {}
    rows = min(MAX_RUN, longest)
    ranges = {"min": (1, 1), "opt": (1, 1), "max": (longest, rows)}
    options = {
        f"{prefix}_profile_{end}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, shape))}"
            for name, shape in (input_shapes(*sizes, cache.max_seq_len) | cache_shapes(cache)).items()
        )
        for end, sizes in ranges.items()
    }
    if gpu.device_id:
        options["device_id"] = str(gpu.device_id)
    built = folder / ORT_CACHES[provider]
    try:
        built.mkdir(parents=True, exist_ok=True)
    except OSError:  # a bundle that can't be written: built again every time
        return options
    if provider == "tensorrt":
        return {**options, "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(built)}
    return {**options, "nv_runtime_cache_path": str(built)}
