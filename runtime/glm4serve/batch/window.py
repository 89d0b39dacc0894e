"""All lines of a batch: so many at once that the model always has work, and no more in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4serve.batch.answerer import Answerer, Parsed
from glm4serve.batch.answers import AnswersFile, failed
from glm4serve.batch.requests import read_lines
from glm4serve.models import Models

_AHEAD = 16  # requests, for each that is computed, that may have been read: done ones wait for the first of them
_MOST_BYTES = 64 << 20  # of their lines together


@dataclass
class Progress:
    """Of this run."""

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        """One more."""
        self.answered += 1
        if failed(answer):
            self.failed += 1
            return
        usage = answer["response"]["body"]["usage"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage.get("completion_tokens", 0)


@dataclass(frozen=True)
class _Entry:
    future: Future[dict[str, Any]]
    bytes: int


def answer_all(
    requests: Path,
    answers: AnswersFile,
    models: Models,
    *,
    at_once: int,
    ordered: bool = True,
    told: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Answer what isn't answered, and append it. It closes no model.

    at_once: requests that the model is given; embeddings are computed one after the other. ordered: answers come in the
    requests' order. told: called after each answer.

    Raises UserError where a file can't be read or written, EngineClosed where the model takes no more requests: the
    answers so far are in the file.
    """
    pool = ThreadPoolExecutor(at_once if models.generators else 1, "glm4-batch")
    try:
        return _Window(pool, requests, answers, Answerer(models), _AHEAD * at_once, ordered, told).run()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # those under way end with their engine


class _Window:
    def __init__(
        self,
        pool: ThreadPoolExecutor,
        requests: Path,
        answers: AnswersFile,
        answerer: Answerer,
        most: int,
        ordered: bool,
        told: Callable[[Progress], None],
    ) -> None:
        self._pool, self._requests, self._answers, self._answerer = pool, requests, answers, answerer
        self._most, self._ordered, self._told = most, ordered, told
        self._entries: deque[_Entry] = deque()
        self._progress = Progress()

    def run(self) -> Progress:
        seen: set[bytes] = set()
        for line in read_lines(self._requests):
            parsed = Parsed(line, seen)  # of those that are answered too: others may have the same custom_id
            if self._answers.digest(line.number) is not None:
                continue
            future = self._pool.submit(self._answerer.answer, self._answers.id_of(line.number, line.digest), parsed)
            self._entries.append(_Entry(future, len(line.data or b"")))
            while len(self._entries) >= self._most or sum(entry.bytes for entry in self._entries) > _MOST_BYTES:
                self._wait()
            self._write()
        while self._entries:
            self._wait()
        self._answers.sync()
        return self._progress

    def _wait(self) -> None:
        first = [self._entries[0].future] if self._ordered else [entry.future for entry in self._entries]
        wait(first, return_when=FIRST_COMPLETED)
        self._write()

    def _write(self) -> None:
        """Append what is done and may be told."""
        if self._ordered:
            while self._entries and self._entries[0].future.done():
                self._append(self._entries.popleft())
            return
        for entry in [entry for entry in self._entries if entry.future.done()]:
            self._entries.remove(entry)
            self._append(entry)

    def _append(self, entry: _Entry) -> None:
        answer = entry.future.result()
        self._answers.append(answer)
        self._progress.add(answer)
        self._told(self._progress)
