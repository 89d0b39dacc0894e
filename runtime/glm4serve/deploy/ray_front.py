"""In front of the replicas: reads a request, has one of them answer it, and another one where that dies in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Protocol

import anyio
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4serve import logs, page
from glm4serve.app import cors
from glm4serve.bodies import Bodies
from glm4serve.deploy.ray_replica import SCOPE
from glm4serve.deploy.routing import blocks_of
from glm4serve.errors import ApiError, timed_out, unavailable
from glm4serve.gate import OPEN, admitted, request_id
from glm4serve.responses import respond
from glm4serve.settings import Settings
from glm4serve.sse import event

_ATTEMPTS = 3
_CUT = 5.0  # seconds in which clients are told that the service ends
_LATE = (
    5.0  # seconds beyond a request's own after which no replica is waited for; a balancer's question has these alone
)
_ENDING = "the server is being shut down"
#: Each replica has its own numbers: one of them alone would be taken for the whole.
_OF_ONE_REPLICA = frozenset({"/metrics", "/slots"})


class Messages(Protocol):
    """A replica's answer on its way."""

    def __aiter__(self) -> Any:
        """(head or None, message) pairs of ASGI messages."""

    def cancel(self) -> None:
        """End it there."""


Ask = Callable[[tuple[bytes, ...], dict[str, Any], bytes], Messages]


class _Ended(Exception):
    """The service is over."""


class _Late(Exception):
    """No replica has begun to answer in time: there's none, or it hangs."""


class Front:
    """An ASGI application that keeps no model.

    A request of which nothing has been answered yet is asked again where its replica dies: nothing but its answer
    depends on it. A stream that has begun can't be: it ends with an error event.
    """

    def __init__(self, ask: Ask, lost: tuple[type[BaseException], ...], settings: Settings) -> None:
        """ask: sends a request to a replica. lost: what is raised where that one is no more. settings: theirs."""
        self._ask, self._lost, self._settings, self._bodies = ask, lost, settings, Bodies(settings)
        self._keyless = page.PATHS if settings.page else frozenset[str]()
        self._draining, self._in_flight, self._over = False, 0, asyncio.Event()

    async def drain(self, seconds: float) -> None:
        """Take no more requests; those under way have so long, and are then told that the service ends."""
        self._draining = True
        for limit in (seconds, _CUT):
            with anyio.move_on_after(limit):
                while self._in_flight:
                    await asyncio.sleep(0.02)
            self._over.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            self._in_flight += 1
            try:
                error = await self._answer(scope, receive, send)
                if error is not None:
                    await self._refuse(error, scope, receive, send)
            finally:
                self._in_flight -= 1
                self._bodies.let_go(scope)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> ApiError | None:
        """Pass a replica's answer on; returns an error where nothing has been answered."""
        path, loop = scope["path"], asyncio.get_running_loop()
        try:
            if self._draining and path != "/health":
                raise unavailable(_ENDING)
            admitted(self._settings, self._keyless, scope)  # before it costs a replica anything
            if path in _OF_ONE_REPLICA:
                raise ApiError(
                    404, f"{path}: each replica has its own; Ray's metrics tell all of them", code="not_found"
                )
            own = 0.0 if path in OPEN else self._settings.request_timeout
            until = None if own is None else loop.time() + own + _LATE
            body = await self._bodies.read(scope, receive) or b""
        except ApiError as error:
            return error
        sent = {key: scope[key] for key in SCOPE if key in scope}
        return await self._forward((blocks_of(body), sent, body), until, send)

    async def _forward(self, asked: tuple[Any, ...], until: float | None, send: Send) -> ApiError | None:
        path = asked[1]["path"]
        for attempt in range(1, _ATTEMPTS + 1):
            answer, head = self._ask(*asked), None
            coming = answer.__aiter__()
            try:
                while (pair := await self._next(coming, until if head is None else None)) is not None:
                    first, message = pair
                    if first is not None:
                        head = first
                        await send(first)
                    await send(message)
                return None
            except _Late:
                logs.event("no replica in time", attempt=attempt, path=path)
                if path in OPEN:
                    return unavailable("no replica answers")
                return timed_out("the request's time was over before a replica answered it")
            except _Ended:
                if head is None:
                    return unavailable(_ENDING)
                await send(_broken(path, head, _ENDING))
                return None
            except self._lost as error:
                logs.event("replica lost", error=type(error).__name__, attempt=attempt, path=path, begun=bool(head))
                if head is not None:
                    await send(_broken(path, head, "the replica that wrote this answer died"))
                    return None
            finally:
                answer.cancel()
        return unavailable("the replicas that had this request died")

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer it here, and tell the log: no replica knows of it."""
        id = request_id(Headers(scope=scope))
        error.headers["request-id"] = id  # by Anthropic's name; Ray gives every answer an x-request-id
        logs.request(id=id, method=scope["method"][:20], path=scope["path"][:100], status=error.status)
        told: ASGIApp = respond(scope["path"], error)
        if self._settings.cors_origins:  # or the page that asked couldn't read it
            told = CORSMiddleware(told, **cors(self._settings))
        await told(scope, receive, send)

    async def _next(self, coming: Any, until: float | None) -> Any:
        """A replica's next pair; None behind the last one. Raises _Ended, _Late, or what reading it does."""
        over = asyncio.ensure_future(self._over.wait())
        pair = asyncio.ensure_future(_pair(coming))
        pair.add_done_callback(_heard)
        try:
            left = None if until is None else max(0.0, until - asyncio.get_running_loop().time())
            await asyncio.wait({over, pair}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not pair.done():
                raise _Ended if over.done() else _Late
            return pair.result()
        finally:
            over.cancel()
            pair.cancel()


async def _pair(coming: Any) -> Any:
    return await anext(coming, None)


def _heard(pair: asyncio.Task[Any]) -> None:
    """Nobody waits any more where the client has gone: then what it raises is no news, and asyncio logs none."""
    if not pair.cancelled():
        pair.exception()


def _broken(path: str, head: Message, why: str) -> Message:
    """The end of an answer that had begun."""
    body, headers = b"", {name.lower(): value for name, value in head["headers"]}
    if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        error = respond(path, unavailable(f"{why}; what came is not the whole"))
        shown = json.loads(bytes(error.body))
        body = event(shown, "error" if "type" in shown else None).encode()  # a form that has a type of its own: named
    return {"type": "http.response.body", "body": body, "more_body": False}


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


class FrontReplica:
    """A Ray Serve deployment's class, of which Ray makes an ingress with :func:`build` 's application."""

    def __init__(self, replicas: object) -> None:
        """replicas: a handle, which makes Ray start them first."""

    async def drain(self, seconds: float) -> None:
        """As the application's."""
        await _front[0].drain(seconds)


_front: list[Front] = []  # this process's: Ray makes deployment and application apart from each other


def build(ask: Ask, lost: tuple[type[BaseException], ...], settings: Settings) -> Front:
    """The application of this process, whose log is ours."""
    logs.configure()
    _front[:] = [Front(ask, lost, settings)]
    return _front[0]
