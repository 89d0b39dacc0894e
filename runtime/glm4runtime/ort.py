"""A bundle in ONNX Runtime: prefill and decode graphs over one cache, everything bound once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from glm4runtime.cache import Buffer, Cache
from glm4runtime.contract import ATTENTION_MASK, DECODE, INPUT_IDS, LOGITS, PREFILL, BundleError, Manifest, UserError
from glm4runtime.prepare import prepared_graph

ort.disable_telemetry_events()  # what a service runs is its own business

MAX_RUN = 16  # tokens that one run of the decode graph may verify; from about there on, cost grows as fast as width
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtRunner:
    """One sequence on one bundle. Not thread-safe: a service opens one session for each worker.

    ``length`` tokens are in the cache; :meth:`prefill` and :meth:`decode` append, :meth:`rewind` takes back,
    :meth:`verify` looks ahead and :meth:`accept` appends what it looked at.
    The logits returned are the session's own buffer, overwritten by the next call.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str | None = None,
        threads: int = 0,
        max_seq_len: int | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        """Open both graphs and allocate the cache.

        provider: ``cpu`` or ``cuda``, by default the bundle's target. threads: 0 lets ONNX Runtime choose.
        max_seq_len: cache length in tokens, at most the bundle's (its default). prefill_chunk: prompt tokens a run.
        Raises UserError for a provider that isn't installed or sizes out of range, BundleError for a damaged graph.
        """
        device = provider or manifest.target
        provider_name = _provider_of(device)
        limit = manifest.cache.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise UserError(f"max_seq_len={max_seq_len} is not in 1..{limit}, the positions {folder} was built for")
        if prefill_chunk < 1 or threads < 0:
            raise UserError(f"prefill_chunk={prefill_chunk} must be at least 1 and threads={threads} at least 0")
        self.manifest = manifest
        self.max_seq_len = max_seq_len or limit
        self.length = 0
        self.epoch = 0  # counts rewinds, so that a generation notices when its cache was taken
        self._chunk = min(prefill_chunk, self.max_seq_len)
        self._cache = Cache(manifest.cache, self.max_seq_len, device)
        self._mask = Buffer((1, self.max_seq_len), "int64", device)
        self._mask.write(np.ones((1, self.max_seq_len), np.int64))
        self._prompt = Buffer((1, self._chunk), "int64", device)
        self._token = Buffer((1, 1), "int64", device)
        self._draft = Buffer((1, MAX_RUN), "int64", device)
        self._logits = Buffer((1, MAX_RUN, manifest.vocab_size), "float32", "cpu")  # rows not used cost no memory
        self._prompt_host = np.zeros((1, self._chunk), np.int64)
        self._token_host = np.zeros((1, 1), np.int64)
        self._draft_host = np.zeros((1, MAX_RUN), np.int64)
        self._ahead = 0  # tokens behind `length` that the last verify wrote into the cache
        self._prefill, self._decode = (
            _open_graph(folder, manifest, name, provider_name, threads) for name in (PREFILL, DECODE)
        )
        self._prefill_binding, self._decode_binding = self._prefill.io_binding(), self._decode.io_binding()
        self._verify_binding = self._decode.io_binding()
        for binding in (self._prefill_binding, self._decode_binding, self._verify_binding):
            self._cache.bind(binding)
            self._logits.bind_output(binding, LOGITS, (1, 1, manifest.vocab_size))
        self._token.bind_input(self._decode_binding, INPUT_IDS)
        self._row: np.ndarray = self._logits.array[0, 0]  # [vocab]

    @property
    def device(self) -> str:
        """Where cache and inputs live: ``cpu`` or ``cuda``."""
        return self._token.device

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens computed in one run."""
        return self._chunk

    @property
    def decode_graph(self) -> Any:
        """The decode graph's onnxruntime session, for runs over a cache of one's own."""
        return self._decode

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Append a prompt (or more of one), in chunks; returns the last token's logits, float32 [vocab].

        Raises UserError where there's no token, an id outside the vocabulary, or no room in the cache.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UserError("the prompt is empty; at least one token is needed")
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"token id {bad} is not in 0..{self.manifest.vocab_size - 1}, the model's vocabulary")
        if self.length + len(ids) > self.max_seq_len:
            raise UserError(
                f"the prompt needs {self.length + len(ids)} tokens, the cache holds {self.max_seq_len}; "
                "shorten it, or open or build the bundle with a larger max_seq_len"
            )
        for start in range(0, len(ids), self._chunk):
            self._prefill_chunk(ids[start : start + self._chunk])
        return self._row

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab]. Raises UserError when the cache is full."""
        if self.length >= self.max_seq_len:
            raise UserError(f"the cache is full: it holds {self.max_seq_len} tokens")
        self.length += 1
        self._token_host[0, 0] = token
        self._token.write(self._token_host)
        self._mask.bind_input(self._decode_binding, ATTENTION_MASK, (1, self.length))
        self._decode.run_with_iobinding(self._decode_binding)
        self._ahead = 0
        return self._row

    def verify(self, tokens: Sequence[int], start: int | None = None) -> np.ndarray:
        """Look ahead: the logits behind each of 1 to MAX_RUN tokens in one run, float32 [len(tokens), vocab].

        They are taken to follow the cache's first ``start`` tokens, by default all ``length``. ``length`` stays;
        :meth:`accept` appends those that prove right. Raises UserError where the cache has no room.
        """
        start, count = self.length if start is None else start, len(tokens)
        end = start + count
        if not 1 <= count <= MAX_RUN or not 0 <= start <= self.length:
            raise ValueError(f"verify: {count} tokens from {start}, expected 1 to {MAX_RUN} from 0 to {self.length}")
        if end > self.max_seq_len:
            raise UserError(f"the cache has no room for {count} tokens behind {start}: it holds {self.max_seq_len}")
        binding = self._verify_binding
        self._draft_host[0, :count] = tokens
        self._draft.write(self._draft_host)
        self._draft.bind_input(binding, INPUT_IDS, (1, count))
        self._mask.bind_input(binding, ATTENTION_MASK, (1, end))
        self._logits.bind_output(binding, LOGITS, (1, count, self.manifest.vocab_size))
        self._decode.run_with_iobinding(binding)
        self._ahead = max(0, end - self.length)
        rows: np.ndarray = self._logits.array[0, :count]
        return rows

    def accept(self) -> None:
        """Append the next token of those that the last :meth:`verify` looked at: they are in the cache already."""
        if not self._ahead:
            raise ValueError("accept: no verified token is left; verify some, or decode")
        self._ahead -= 1
        self.length += 1

    def rewind(self, length: int = 0) -> None:
        """Keep only the first ``length`` tokens of the cache."""
        if not 0 <= length <= self.length:
            raise UserError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length
        self.epoch += 1
        self._ahead = 0

    def _prefill_chunk(self, ids: np.ndarray) -> None:
        binding, count = self._prefill_binding, len(ids)
        self._prompt_host[0, :count] = ids
        self._prompt.write(self._prompt_host)
        self._prompt.bind_input(binding, INPUT_IDS, (1, count))
        self._mask.bind_input(binding, ATTENTION_MASK, (1, self.length + count))
        self._prefill.run_with_iobinding(binding)
        self.length += count
        self._ahead = 0


def _provider_of(device: str) -> str:
    if device not in PROVIDERS:
        raise UserError(f"provider {device!r} is not known; known: {', '.join(PROVIDERS)}")
    name, available = PROVIDERS[device], ort.get_available_providers()
    if name not in available:
        raise UserError(
            f"{name} is not in the installed onnxruntime (it has {', '.join(available)}); "
            f"pip install 'glm4export[{'gpu' if device == 'cuda' else 'cpu'}]'"
        )
    return name


def _open_graph(folder: Path, manifest: Manifest, graph: str, provider: str, threads: int) -> Any:
    prepared = prepared_graph(folder, manifest, graph) if provider == PROVIDERS["cpu"] else None
    return _open(prepared or folder / manifest.graphs[graph].file, provider, threads, optimized=prepared is not None)


def _open(path: Path, provider: str, threads: int, *, optimized: bool) -> Any:
    options = ort.SessionOptions()
    if optimized:  # before it was saved
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A worker that spins between two sessions' runs takes a core from the next one: 5% of a decode step on two cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # onnxruntime raises its own unrelated classes
        raise BundleError(f"{path}: onnxruntime cannot open it: {str(error).splitlines()[0]}") from None
    if provider not in session.get_providers():  # onnxruntime falls back to the CPU and only logs it
        raise UserError(f"{provider} could not start; check the driver and the CUDA and cuDNN libraries it needs")
    return session
