"""From a protocol's requests to the engine and back: the seam that every protocol's module stands on.

A protocol's route is ``return await answered(http, body)``, where the body makes requests and the answer's form.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import anyio.to_thread
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4runtime.contract import UserError
from glm4runtime.engine.request import Delta, Request, Result, Usage
from glm4serve import logs
from glm4serve.errors import ApiError, timed_out, told, unavailable
from glm4serve.event_stream import EventStream, disconnected
from glm4serve.models import Generator
from glm4serve.service import Service, note, owner_of, service_of

if TYPE_CHECKING:
    from glm4runtime.engine.handle import Handle


class Answer(Protocol):
    """A protocol's form of an answer, whole or in events. Texts are whole events, see :func:`glm4serve.sse.event`."""

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """A result for each prompt."""

    def begin(self, prompt_tokens: int) -> Iterable[str]:
        """In front of the first delta. prompt_tokens: of all prompts."""

    def delta(self, prompt: int, delta: Delta) -> Iterable[str]:
        """What is new in an answer to the prompt of that index."""

    def end(self, results: Sequence[Result]) -> Iterable[str]:
        """Behind the last one; a result for each prompt."""

    def error(self, error: ApiError) -> Iterable[str]:
        """In place of what would have followed."""


class Body(Protocol):
    """A protocol's request."""

    @property
    def model(self) -> str | None:
        """Which one; None: the only one."""

    @property
    def prompt_field(self) -> str:
        """The field that holds prompts, for errors."""

    @property
    def streams(self) -> bool:
        """Whether events are wanted."""

    def requests(self, generator: Generator) -> Sequence[Request]:
        """One for each prompt. Raises ApiError and UserError for fields that don't go together."""

    def answer(self, generator: Generator) -> Answer:
        """Its answer's form."""


async def answered(http: HttpRequest, body: Body) -> Response:
    """Have a request answered. Raises ApiError for what can't be."""
    generator = service_of(http).models.generator(body.model)
    note(http, model=generator.name)
    try:
        requests = body.requests(generator)
    except UserError as error:
        raise told(error) from error
    asked = requests[0].params
    note(http, n=requests[0].n, max_tokens=asked.max_new_tokens, temperature=asked.temperature, top_p=asked.top_p)
    run, answer = await _submit(http, generator, requests, body.prompt_field), body.answer(generator)
    if body.streams:
        return run.stream(answer)
    results = await run.whole()
    # In a thread, by Rust's writer: with log-probabilities an answer has megabytes, and others must not wait for it
    content = await anyio.to_thread.run_sync(lambda: to_json(answer.whole(results)))
    return Response(content, media_type="application/json")


async def _submit(http: HttpRequest, generator: Generator, requests: Sequence[Request], param: str) -> Run:
    """Have all of them answered, or none. Raises ApiError."""
    service = service_of(http)
    settings, run = service.settings, Run(service, generator, http)
    try:
        for request in requests:
            asked = replace(request, key=owner_of(http), timeout=settings.request_timeout)
            # In a thread: the template runs in another process, and a grammar may take a while.
            run.handles.append(await anyio.to_thread.run_sync(generator.submit, asked))
    except BaseException as error:
        run.close()
        if isinstance(error, UserError):  # anyio's future holds it, and its frames hold the prompt and that future
            error.__traceback__ = None
        if isinstance(error, Exception):
            raise told(error, param) from error
        raise
    return run


class Run:
    """Answers under way for one HTTP request. Whoever has one closes it; ``whole`` and ``stream`` do."""

    def __init__(self, service: Service, generator: Generator, http: HttpRequest) -> None:
        self.handles: list[Handle] = []
        self._service, self._generator, self._http = service, generator, http
        self._reasons: list[str] = []
        service.runs.add(self)

    async def whole(self) -> list[Result]:
        """Each prompt's result. Raises ApiError where one failed, ran out of time, or the client went away."""
        gone = asyncio.ensure_future(disconnected(self._http.receive))
        work = asyncio.ensure_future(self._results())
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(499, "the client went away", code="client_gone")
            return work.result()
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({gone, work})
            del work  # it holds its error, and the error this frame
            self.close()

    def stream(self, answer: Answer) -> EventStream:
        """The response that tells of the answers as they come; an error ends it in the protocol's form."""
        return EventStream(self._events(answer), closed=self.close, ping=self._service.settings.ping)

    def cancel(self) -> None:
        """End the answers; whoever reads them is told that the server does."""
        for handle in self.handles:
            handle.cancel()

    def close(self) -> None:
        """Let go of the engine: cancels what isn't done, and notes what was. Again: no effect."""
        if self not in self._service.runs:
            return
        self._service.runs.discard(self)
        self.cancel()
        if not self.handles:
            return
        total = sum((handle.usage for handle in self.handles), Usage(0, 0, 0))
        note(
            self._http,
            prompt_tokens=total.prompt_tokens,
            cached_tokens=total.cached_tokens,
            completion_tokens=total.completion_tokens,
            finish_reasons=self._reasons or ["cancelled"],
            queue_seconds=_rounded(self.handles[0].timing.started),
            first_token_seconds=_rounded(self.handles[0].timing.first_token),
        )
        for handle in self.handles:
            if handle.timing.finished is not None and self._reasons:
                self._service.metrics.finished(self._generator.name, handle.timing)
        self.handles = []  # what FastAPI keeps of a streamed request waits for the garbage collector

    async def _results(self) -> list[Result]:
        async for _ in self._deltas():
            pass
        return [await handle.result_async() for handle in self.handles]

    async def _events(self, answer: Answer) -> AsyncGenerator[str, None]:
        try:
            for text in answer.begin(sum(handle.usage.prompt_tokens for handle in self.handles)):
                yield text
            async for prompt, delta in self._deltas():
                for text in answer.delta(prompt, delta):
                    yield text
            results = [await handle.result_async() for handle in self.handles]
            for text in answer.end(results):
                yield text
        except Exception as error:
            if not isinstance(error, ApiError):
                logs.failure(self._http.scope.get("glm4.id", ""), error)
            note(self._http, error=told(error).code)
            for text in answer.error(told(error)):
                yield text

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of all the prompts' answers. Raises ApiError where one was ended from outside."""
        metrics, name = self._service.metrics, self._generator.name
        last: dict[tuple[int, int], float] = {}
        async with contextlib.aclosing(_merged(self.handles)) as merged:
            async for prompt, delta in merged:
                if delta.tokens:
                    now, answer = time.monotonic(), (prompt, delta.choice)
                    if answer in last:
                        metrics.between(name, now - last[answer], len(delta.tokens))
                    last[answer] = now
                if delta.finish_reason is not None:
                    self._reasons.append(delta.finish_reason)
                if delta.finish_reason == "timeout":
                    raise timed_out("the request's time was over before its answer was whole")
                if delta.finish_reason == "cancelled":
                    raise unavailable("the server is being shut down, and ended the answer before it was whole")
                yield prompt, delta


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


async def _merged(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of several handles, as they come, each with its handle's index."""
    if len(handles) == 1:
        async for delta in handles[0]:
            yield 0, delta
        return
    coming = {asyncio.ensure_future(anext(handle)): index for index, handle in enumerate(handles)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index = coming.pop(future)
                try:
                    delta = future.result()
                except StopAsyncIteration:
                    continue
                coming[asyncio.ensure_future(anext(handles[index]))] = index
                yield index, delta
    finally:
        for future in coming:
            future.cancel()
