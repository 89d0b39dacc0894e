"""llama.cpp's continuous batching, driven as its server drives it: one ``llama_decode`` for all that goes on.

A batch has one token of every answer under way first, then as much of the prompts as fits (``update_slots`` in
tools/server/server.cpp). The server itself isn't in llama-cpp-python's wheels; what it adds is HTTP and sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from peers.llamacpp import context_params, kernels, llama_cpp, open_file
from peers.protocol import Groups
from peers.serving import Times

_BATCH = 2048  # the server's default


@dataclass
class _Sequence:
    """What one sequence of the cache holds."""

    pending: list[int]  # tokens that aren't in the cache yet
    length: int = 0  # tokens that are
    times: Times = field(default_factory=Times)


class LlamaCppServer:
    """One GGUF file and several sequences in one cache; flash attention, repacked weights, cache f16."""

    def __init__(self, path: Path, threads: int, slots: int, context: int) -> None:
        params = context_params(threads, slots * context)
        params.n_seq_max, params.n_batch, params.kv_unified = slots, _BATCH, True
        self._model, self._context = open_file(path, params)
        self._slots = slots
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) {path.stem}"
        self.settings = (
            f"{threads} threads, {slots} sequences in one cache, batches of {_BATCH} in runs of {params.n_ubatch}, "
            f"repacking, flash attention, cache f16, built with {kernels()}"
        )
        self.groups: Groups = {}
        self.files_bytes = path.stat().st_size

    def answer(self, prompts: Sequence[list[int]], new_tokens: int, at_once: int) -> list[Times]:
        llama_cpp.llama_memory_clear(self._memory, False)
        answers: list[Times] = []
        under_way: dict[int, _Sequence] = {}
        while under_way or len(answers) < len(prompts):
            for slot in range(at_once):
                if slot not in under_way and len(answers) < len(prompts):
                    under_way[slot] = _Sequence(prompts[len(answers)])
                    answers.append(under_way[slot].times)
            for slot, token in self._run(under_way).items():
                sequence = under_way[slot]
                sequence.times.came(token)
                sequence.pending = [token]
                if len(sequence.times.tokens) == new_tokens:
                    del under_way[slot]
                    llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return answers

    def _run(self, sequences: dict[int, _Sequence]) -> dict[int, int]:
        """One batch; the next tokens of those whose last pending token was in it, by their slots."""
        batch, ready = self._batch, []
        batch.n_tokens = 0
        # Answers under way have one token pending each, prompts more.
        for slot, sequence in sorted(sequences.items(), key=lambda item: len(item[1].pending)):
            part = sequence.pending[: _BATCH - batch.n_tokens]
            for token in part:
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token, sequence.length
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, slot, False
                batch.n_tokens += 1
                sequence.length += 1
            sequence.pending = sequence.pending[len(part) :]
            if part and not sequence.pending:
                batch.logits[batch.n_tokens - 1] = True
                ready.append(slot)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (len(ready), self._vocab))
        return dict(zip(ready, rows.argmax(axis=1).tolist(), strict=True))
