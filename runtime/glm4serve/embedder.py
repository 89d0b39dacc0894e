"""An encoder behind a queue: it computes in one thread, one request after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from glm4runtime.encoder import Encoder
from glm4serve.errors import queue_full


@dataclass(frozen=True)
class Embeddings:
    """rows: float32 [texts, hidden]; tokens: of all texts together."""

    rows: np.ndarray
    tokens: int


class Embedder:
    """A model that gives embeddings."""

    def __init__(self, name: str, encoder: Encoder, queue: int) -> None:
        """queue: requests that may wait."""
        self.name, self.encoder = name, encoder
        self.pending = 0  # waiting, or being computed, even where nobody waits for it any more
        self._queue, self._turn = queue, asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, f"glm4-embed-{name}")

    @property
    def most_tokens(self) -> int:
        """Of a text."""
        return self.encoder.max_seq_len

    async def embed(self, texts: Sequence[str | list[int]]) -> Embeddings:
        """Their embeddings. Cancelled while it waits, it's never computed.

        Raises ApiError (429) where the queue is full, UserError as :meth:`Encoder.embed` does.
        """
        if self.pending > self._queue:  # one of them is being computed
            raise queue_full(f"the queue is full: {self._queue} requests wait for this model", 1)
        self.pending += 1
        try:
            await self._turn.acquire()  # not the executor's queue, which keeps the texts of those who went away
        except BaseException:
            self.pending -= 1
            raise
        loop = asyncio.get_running_loop()
        try:
            future = self._thread.submit(self.compute, texts)
        except BaseException:  # it was closed: those behind are to be told so, too
            self._next()
            raise
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._next))
        return await asyncio.wrap_future(future)

    def _next(self) -> None:
        self.pending -= 1
        self._turn.release()

    def compute(self, texts: Sequence[str | list[int]]) -> Embeddings:
        """Their embeddings, in the calling thread. Raises UserError as :meth:`Encoder.embed` does."""
        encoder = self.encoder
        most = encoder.max_seq_len if encoder.truncate else None
        ids = [encoder.tokenizer.encode_text(text, most)[0] if isinstance(text, str) else text for text in texts]
        return Embeddings(encoder.embed(ids), sum(map(len, ids)))

    def close(self) -> None:
        """End the thread, not the encoder."""
        self._thread.shutdown(cancel_futures=True)
