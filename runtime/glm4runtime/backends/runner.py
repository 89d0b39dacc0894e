"""One sequence on one bundle: append tokens, look ahead, take back. Subclasses run the graphs.

:mod:`glm4runtime.backends.ort` (prefill and decode graphs), :mod:`glm4runtime.backends.ort_step` and
:mod:`glm4runtime.backends.trt` (step graphs, in ONNX Runtime and as a TensorRT engine) fill in the three kinds of run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from glm4runtime.backends.held_row import HeldRow, Logits, whole
from glm4runtime.backends.prompt_runs import lacking, prompt_runs, run_start
from glm4runtime.backends.sequence import TokenSequence
from glm4runtime.backends.token_ids import checked_ids, is_id
from glm4runtime.contract import Manifest, UserError, shown

MAX_RUN = 16  # tokens that one run may verify; from about there on, cost grows as fast as width
_PAIR = 2  # rows: runs of as many more or less agree to the bit on every CPU seen (glm4runtime.backends.invariance)
_RUNS = ("_run_prompt", "_run_token", "_run_draft")


class Runner(ABC):
    """One sequence on one bundle. Not thread-safe: a service opens one session for each worker.

    ``length`` tokens are in the cache; :meth:`prefill` and :meth:`decode` append, :meth:`rewind` takes back,
    :meth:`verify` looks ahead and :meth:`accept` appends what it looked at. A call that is interrupted or fails leaves
    ``length`` as it was, or after the last chunk of a prompt that was computed whole.
    The logits returned are the session's own buffer, overwritten by the next call.

    ``top_count``: how many of a row's tokens come along where :meth:`step` and :meth:`look_ahead` hold rows; 0 where
    they hold none. ``draft_rows``: tokens in a run beyond which it takes the time of several steps, so that drafts stay
    within.
    ``invariant`` is False and ``granule`` 1 until :func:`glm4runtime.backends.invariance.make_invariant` sets them.
    From then on every run over the graphs has a multiple of so many tokens: fillers stand behind the last one, or
    tokens in front are computed again.
    """

    def __init__(self, manifest: Manifest, *, max_seq_len: int | None, prefill_chunk: int) -> None:
        """max_seq_len: tokens that the sequence may have, at most the bundle's, its default. prefill_chunk: prompt
        tokens per run, at least 1. Raises UserError for a max_seq_len out of range.
        """
        limit = manifest.cache.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise UserError(f"max_seq_len={max_seq_len} is not in 1..{limit}, the positions the bundle was built for")
        self.manifest = manifest
        self.max_seq_len = max_seq_len or limit
        self.prefill_chunk = min(prefill_chunk, self.max_seq_len)
        self.draft_rows = MAX_RUN
        self.top_count = 0
        self.invariant = False
        self.granule = 1
        self.sequence = TokenSequence(self.max_seq_len)
        self.closed = False
        self._holding = False  # whether the run about to be made holds its rows
        self._adapter: tuple[str | None, ...] = (None,)  # that runs use; () while it is being changed

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.sequence.length

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that are loaded."""
        return ()

    def use_adapter(self, name: str | None) -> None:
        """From now on compute with the adapter of that name, or (None) the base model alone.

        Where it is another than before, the cache is left empty: its rows are another model's. Raises UserError for a
        name that isn't known, and nothing changes then.
        """
        if name is not None and name not in self.adapters:
            raise unknown_adapter(name, self.adapters)
        if self._adapter != (name,):
            self.sequence.rewind()
            self._adapter = ()
            self._bind_adapter(name)
            self._adapter = (name,)

    def token_ids(self, tokens: Any) -> np.ndarray:
        """A prompt as int64 [n]. Raises UserError unless it's at least one token id of the vocabulary, in a row."""
        return checked_ids(tokens, self.manifest.vocab_size)

    def check_prompt(self, tokens: Any, start: int = 0) -> np.ndarray:
        """The same for a prompt to be appended behind ``start`` tokens. Raises UserError also where it has no room."""
        ids = self.token_ids(tokens)
        if start + len(ids) > self.max_seq_len:
            raise UserError(
                f"the prompt needs {start + len(ids)} tokens, the cache holds {self.max_seq_len}; "
                "shorten it, or open or build the bundle with a larger max_seq_len"
            )
        return ids

    def prefill(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append a prompt (or more of one), in chunks; returns the last token's logits, float32 [vocab].

        Raises UserError where there's no token, an id outside the vocabulary, or no room in the cache.
        """
        sequence = self.sequence
        ids = self.check_prompt(tokens, sequence.length)
        end = sequence.length + len(ids)
        sequence.record(ids, sequence.length)
        for first, last in self._chunks(end):
            exact = not self._coarse or first % self._grid == 0
            if not exact:
                sequence.overwrite(first)
            padding = lacking(last - first, self.granule)
            chunk = sequence.written(first, last)
            row = self._run_prompt(np.append(chunk, [0] * padding) if padding else chunk, first, padding)
            sequence.extend(first, last, exact=exact)
        return row

    def resume(self, ids: np.ndarray) -> int:
        """Rewind to what the cache has of a prompt, int64 [n], and return how many tokens that is, below n.

        The rest, to be given to :meth:`prefill`, has at least one token, whose logits are wanted. Rows that decode
        steps wrote are kept too, and logits then differ within rounding from those of a prompt computed whole; an
        invariant session keeps none but those that have a prompt's bits, and from its grid on.
        """
        sequence = self.sequence
        rows = min(sequence.common_prefix(ids), len(ids) - 1)
        if self.invariant:
            rows = min(rows, sequence.exact)
            rows -= rows % self._grid
        else:  # not a lone row, nor an odd number more or less than a run over all: the prompt given again, say
            rows = max(0, min(rows, len(ids) - _PAIR))
            rows -= rows % _PAIR
        sequence.rewind(rows)
        return rows

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, float32 [vocab].

        Raises UserError when the cache is full, or for an id outside the vocabulary.
        """
        return whole(self.step(token, hold=False))

    def step(self, token: int, *, hold: bool) -> Logits:
        """As :meth:`decode`; with ``hold`` the row stays where it was computed, if the bundle can say what is in it."""
        sequence, start = self.sequence, self.sequence.length
        if start >= self.max_seq_len:
            raise UserError(f"the cache is full: it holds {self.max_seq_len} tokens")
        if self.granule > 1:
            row: Logits = self.look_ahead([token], hold=hold)[0]
            self.accept()
            return row
        self._check_ids([token])
        sequence.record([token], start)
        sequence.overwrite(start)
        self._holding = hold
        row = self._run_token(token, start)
        sequence.extend(start, start + 1, exact=False)
        return row

    def verify(self, tokens: Sequence[int]) -> np.ndarray:
        """Look ahead: the logits behind each of 1 to MAX_RUN tokens in one run, float32 [len(tokens), vocab].

        ``length`` stays; :meth:`accept` appends those that prove right. Raises UserError where the cache has no room,
        or for an id outside the vocabulary.
        """
        rows = self.look_ahead(tokens, hold=False)
        assert isinstance(rows, np.ndarray)
        return rows

    def look_ahead(self, tokens: Sequence[int], *, hold: bool) -> np.ndarray | list[HeldRow]:
        """As :meth:`verify`; ``hold`` as :meth:`step` has it."""
        sequence, start, count = self.sequence, self.sequence.length, len(tokens)
        end = start + count
        if not 1 <= count <= MAX_RUN:
            raise ValueError(f"verify: {count} tokens, expected 1 to {MAX_RUN}")
        if end > self.max_seq_len:
            raise UserError(f"the cache has no room for {count} tokens behind {start}: it holds {self.max_seq_len}")
        self._check_ids(tokens)
        sequence.record(tokens, start)
        extra = lacking(count, self.granule)
        behind = min(extra, self.max_seq_len - end)  # fillers; at the cache's end, tokens in front instead
        first = start + behind - extra
        run = [*sequence.written(first, end).tolist(), *[int(tokens[-1])] * behind] if extra else tokens
        sequence.overwrite(first)
        self._holding = hold
        rows = self._run_draft(run, first)[start - first : end - first]
        sequence.ahead = count
        return rows

    def accept(self) -> None:
        """Append the next token of those that the last :meth:`verify` looked at: they are in the cache already."""
        self.sequence.accept()

    def rewind(self, length: int = 0) -> None:
        """Keep only the first ``length`` tokens of the cache."""
        self.sequence.rewind(length)

    def close(self) -> None:
        """Free the graphs or the engine, and the cache. From then on every run raises UserError."""
        if self.closed:
            return
        self.closed = True
        for name in _RUNS:
            setattr(self, name, refuse_closed)
        self._release()

    def cache_bits(self, rows: int) -> list[bytes]:
        """The bits of the cache's first ``rows`` rows, every layer's; none where they aren't in the host's memory."""
        return []

    def cache_clipped(self) -> float | None:
        """Of an int8 cache's rows in use, the share of values at the ends of its range; None where that isn't known."""
        return None

    def _check_ids(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not is_id(token, self.manifest.vocab_size):
                self.token_ids([token])  # tells what's wrong with it

    @property
    def _coarse(self) -> bool:
        """Whether bits depend on where a prompt's chunks begin, and matter."""
        return self.invariant and self.manifest.cache.dtype == "int8"

    @property
    def _grid(self) -> int:
        """A prompt's runs begin at its multiples, but for the last one."""
        return self.prefill_chunk - self.prefill_chunk % self.granule if self._coarse else self.granule

    def _chunks(self, end: int) -> Iterator[tuple[int, int]]:
        """First and last row of each run of a prompt that ends at row ``end`` and is appended behind ``length``.

        With a granule, runs begin on its multiples, whatever was appended in which call; the first one may begin in
        front of ``length`` and compute rows again. The last one begins as much earlier as its width needs; where it is
        the only one, from row 0, it is padded. With an int8 cache, where a chunk attends to its own rows before they
        are rounded, bits depend on where chunks begin: there the grid is ``prefill_chunk``, and rows of the call before
        that aren't a prompt's own are computed again.
        """
        granule = self.granule
        first = min(self.length, self.sequence.exact) if self._coarse else self.length
        for border, last in prompt_runs(first, end, width=self.prefill_chunk, granule=granule, grid=self._grid):
            yield run_start(border, last, granule), last

    def _bind_adapter(self, name: str | None) -> None:  # noqa: B027
        """Let every run from now on use an adapter of :attr:`adapters`, or (None) none."""

    def _release(self) -> None:  # noqa: B027
        """Let go of what :meth:`close` frees."""

    @abstractmethod
    def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        """Write tokens, int64 [n], to the cache from row ``start``; the last ``padding`` of them are fillers.

        n is at most ``prefill_chunk``, or the granule where that is more; only a run from row 0 has padding.
        Returns the logits of the last token that's no filler, float32 [vocab].
        """

    @abstractmethod
    def _run_token(self, token: int, start: int) -> Logits:
        """The same for one token: a step of plain decoding. Its row may be held where ``_holding`` says so."""

    @abstractmethod
    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray | list[HeldRow]:
        """The same for 1 to MAX_RUN tokens; returns the logits of each, [len(tokens), vocab]."""


def unknown_adapter(name: object, known: Sequence[str]) -> UserError:
    """What a request is told whose adapter isn't among those that are loaded."""
    loaded = f"loaded: {', '.join(map(shown, known))}" if known else "none is loaded; give load() adapters={name: file}"
    return UserError(f"adapter {shown(name)} is not known; {loaded}")


def refuse_closed(*_: Any) -> NoReturn:
    """Raises UserError: for what a closed session is asked."""
    raise UserError("this session is closed; load the bundle again")
