"""One sequence on one bundle: what is appended, looked ahead at and taken back, whatever runs the graphs.

:mod:`glm4runtime.ort` (prefill and decode graphs), :mod:`glm4runtime.ort_step` and :mod:`glm4runtime.trt` (step graphs,
in ONNX Runtime and as a TensorRT engine) fill in the three kinds of run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from glm4runtime.contract import Manifest, UserError

MAX_RUN = 16  # tokens that one run may verify; from about there on, cost grows as fast as width


class Runner(ABC):
    """One sequence on one bundle. Not thread-safe: a service opens one session for each worker.

    ``length`` tokens are in the cache; :meth:`prefill` and :meth:`decode` append, :meth:`rewind` takes back,
    :meth:`verify` looks ahead and :meth:`accept` appends what it looked at.
    The logits returned are the session's own buffer, overwritten by the next call.
    """

    #: Whether the bits of a row do not depend on the run it is in, from two tokens a run on: see glm4runtime.lookup.
    steady = False

    def __init__(self, manifest: Manifest, *, max_seq_len: int | None, prefill_chunk: int) -> None:
        """max_seq_len: tokens that the sequence may have, at most the bundle's, its default. prefill_chunk: prompt
        tokens a run, at least 1. Raises UserError for a max_seq_len out of range.
        """
        limit = manifest.cache.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise UserError(f"max_seq_len={max_seq_len} is not in 1..{limit}, the positions the bundle was built for")
        self.manifest = manifest
        self.max_seq_len = max_seq_len or limit
        self.prefill_chunk = min(prefill_chunk, self.max_seq_len)
        self.length = 0
        self.epoch = 0  # counts rewinds, so that a generation notices when its cache was taken
        self._ahead = 0  # tokens behind `length` that the last verify wrote into the cache

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
        for first in range(0, len(ids), self.prefill_chunk):
            chunk = ids[first : first + self.prefill_chunk]
            row = self._run_prompt(chunk, self.length)
            self.length += len(chunk)
            self._ahead = 0
        return row

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab]. Raises UserError when the cache is full."""
        if self.length >= self.max_seq_len:
            raise UserError(f"the cache is full: it holds {self.max_seq_len} tokens")
        row = self._run_token(token, self.length)
        self.length += 1
        self._ahead = 0
        return row

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
        rows = self._run_draft(tokens, start)
        self._ahead = max(0, end - self.length)
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

    @abstractmethod
    def _run_prompt(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Write up to ``prefill_chunk`` tokens, int64 [n], to the cache from row ``start``.

        Returns the last one's logits, float32 [vocab].
        """

    @abstractmethod
    def _run_token(self, token: int, start: int) -> np.ndarray:
        """The same for one token: a step of plain decoding."""

    @abstractmethod
    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """The same for 1 to MAX_RUN tokens; returns the logits of each, [len(tokens), vocab]."""
