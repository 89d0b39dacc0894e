"""An engine that says what it's told to: for faults, slowness and full queues that a real one has no switch for."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import glm4export
from glm4runtime.engine import EngineClosed, EngineStats
from glm4runtime.engine.handle import Feed, Handle, RequestFailed
from glm4runtime.engine.prefix import PrefixStats
from glm4runtime.engine.prepare import PromptTooLong
from glm4runtime.engine.request import Delta, Request, Result, Timing, Usage
from glm4runtime.engine.scheduler import QueueFull, SchedulerStats
from glm4runtime.sampling.logprobs import TokenLogprobs
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.files import read_text_files

ROOT = Path(glm4export.__file__).parents[1]
DEMO = ROOT / "glm4export" / "demo"
Script = Callable[[Request], Sequence[Delta]]  # of each choice: its deltas, the last with a finish_reason


def words(*texts: str, reason: str = "stop", **last: Any) -> list[Delta]:
    """Deltas of a text in pieces, one token each."""
    pieces = [Delta(content=text, tokens=(100 + i,)) for i, text in enumerate(texts)]
    return [*pieces, Delta(finish_reason=reason, **last)]  # type: ignore[arg-type]


@functools.cache
def _text() -> BundleText:
    """The embedded model's tokenizer and template: one process for all engines, which ends with ours."""
    return BundleText(DEMO, read_text_files(DEMO))


class FakeEngine:
    """What the service uses of an Engine."""

    def __init__(
        self,
        script: Script | Sequence[Delta] = (),
        *,
        pause: float = 0.0,
        max_queue: int | None = None,
        error: Exception | None = None,
        adapters: Mapping[str, str] | None = None,
        has_draft: bool = False,
    ) -> None:
        """pause: seconds between deltas. max_queue: requests at once, above it QueueFull. error: ends each request.
        adapters, has_draft: as Engine's.
        """
        self.adapters, self.has_draft, self.folder = adapters or {}, has_draft, DEMO
        self.death: str | None = None
        self.requests: list[Request] = []
        self.feeds: list[Feed] = []
        self.running = 0
        self.healthy, self.last_step_age = True, 0.0
        self.manifest = SimpleNamespace(to_json=lambda: "{}")
        self.max_seq_len = 512
        self.tokenizer, self.template = _text().tokenizer, _text().template
        self._script = script if callable(script) else lambda request: script
        self._pause, self._max_queue, self._error = pause, max_queue, error
        self._finished: dict[str, int] = {}

    def submit(self, request: Request) -> Handle:
        """As Engine's."""
        if not self.healthy:
            raise EngineClosed("dead")
        if self._max_queue is not None and self.running >= self._max_queue:
            raise QueueFull(self._max_queue, 7)
        prompt = request.prompt
        if request.messages is not None:
            prompt = self.template.render(request.messages, request.tools, **dict(request.template_variables))
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt or ())
        if len(ids) > self.max_seq_len:
            raise PromptTooLong(len(ids), self.max_seq_len)
        self.requests.append(request)
        feed = Feed()
        feed.usage = Usage(len(ids), 0, 0)
        self.feeds.append(feed)
        self.running += 1
        threading.Thread(target=self._answer, args=(request, feed, ids), daemon=True).start()
        return Handle(feed)

    def die(self, error: Exception) -> None:
        """As an engine does whose thread ends in this error."""
        failure = RequestFailed("the engine's thread died")
        failure.__cause__ = error
        self.healthy, self.death, self._error = False, f"{type(error).__name__}: {error}", failure

    def stats(self) -> EngineStats:
        """As Engine's."""
        scheduler = SchedulerStats(0, self.running, 0, {}, None, None)
        return EngineStats(
            healthy=self.healthy,
            death=self.death,
            last_step_age=self.last_step_age,
            slots=4,
            scheduler=scheduler,
            prompt_tokens=11,
            cached_tokens=3,
            completion_tokens=5,
            drafted_tokens=0,
            accepted_tokens=0,
            finished=dict(self._finished),
            prefixes=PrefixStats(2, 11, 3, 1, 4, 4096, 8192),
        )

    def _answer(self, request: Request, feed: Feed, ids: list[int]) -> None:
        began = time.monotonic()
        wholes = [Delta(index) for index in range(request.n)]
        for scripted in self._script(request):
            for index in range(request.n):
                if feed.cancelled:
                    scripted = Delta(finish_reason="cancelled")
                delta = replace(scripted, choice=index)
                wholes[index] = wholes[index].joined(delta)
                feed.put(delta)
                tokens = feed.usage.completion_tokens + len(delta.tokens)
                feed.usage = replace(feed.usage, completion_tokens=tokens)
                first = feed.timing.first_token or time.monotonic() - began
                feed.timing = Timing(0.0, first)
            if feed.cancelled:
                break
            time.sleep(self._pause)
        feed.timing = replace(feed.timing, finished=time.monotonic() - began)
        self.running -= 1
        reason = wholes[0].finish_reason or "stop"
        self._finished[reason] = self._finished.get(reason, 0) + request.n
        scored = None
        if request.prompt_logprobs is not None:
            scored = (None, *(TokenLogprobs(id, -0.5, ((id, -0.5),)) for id in ids[1:]))
        feed.end(None if self._error else Result(tuple(wholes), feed.usage, feed.timing, scored), self._error)
