"""In front of every request: its id, host and key, its body; behind it: its line in the log."""

from __future__ import annotations

import re
import secrets
import time

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4serve import logs
from glm4serve.bodies import Bodies
from glm4serve.errors import ApiError, told, unavailable
from glm4serve.responses import respond
from glm4serve.service import Service
from glm4serve.settings import Settings

#: Answered without a key, and while the service drains: what a balancer asks.
OPEN = frozenset({"/health", "/ready"})
_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


class SlowReader(Exception):
    """A client left what was sent to it unread for too long."""


class Gate:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        paths: frozenset[str] = frozenset(),
        keyless: frozenset[str] = frozenset(),
    ) -> None:
        """paths: what there is, told in the log and metrics by name also where the request is refused here.
        keyless: paths beside :data:`OPEN` that need no key, such as a page that asks for one itself.
        """
        self._app, self._service, self._paths, self._keyless = app, service, paths, keyless
        self._bodies = Bodies(service.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        scope["glm4.id"] = id = request_id(headers)
        head = scope["method"] == "HEAD"
        if head:  # GET's answer without its body; in a copy, as the server below looks at the method, too
            scope = {**scope, "method": "GET", "glm4.method": "HEAD"}
        began, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found = MutableHeaders(scope=message)
                found["x-request-id"] = found["request-id"] = id  # OpenAI's name and Anthropic's
            elif head:
                message = {**message, "body": b""}
            try:
                with anyio.fail_after(self._service.settings.write_timeout):
                    await send(message)
            except TimeoutError:
                raise SlowReader from None

        counted = path not in OPEN
        self._service.in_flight += counted
        try:
            if counted and self._service.draining:
                raise unavailable("the server is being shut down")
            if (owner := admitted(self._service.settings, self._keyless, scope)) is not None:
                scope["glm4.owner"] = owner
            await self._app(scope, await self._body(scope, receive), answer)
        except ApiError as error:
            if not status:
                await respond(path, error)(scope, receive, answer)
        except SlowReader:
            scope.setdefault("glm4.log", {})["cut"] = "slow reader"
        except Exception as error:
            logs.failure(id, error)
            if not status:
                await respond(path, told(error))(scope, receive, answer)
        finally:
            self._service.in_flight -= counted
            self._bodies.let_go(scope)
            self._tell(scope, headers, id, status or 499, time.monotonic() - began)

    def _tell(self, scope: Scope, headers: Headers, id: str, status: int, seconds: float) -> None:
        """Metrics, trace and log of a request that ended."""
        name = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in self._paths else "(other)")
        self._service.metrics.responses.labels(name, str(status)).inc()
        fields = {
            "id": id,
            "method": scope.get("glm4.method", scope["method"])[:20],
            "path": name,
            "status": status,
            "seconds": round(seconds, 4),
            "key": scope.get("glm4.owner", ""),
            **scope.get("glm4.log", {}),
        }
        traces = self._service.traces
        if traces is not None and "route" in scope and (trace := traces.record(headers, fields)) is not None:
            fields["trace"] = trace
        logs.request(**fields)

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, read here, in front of what else comes."""
        body = await self._bodies.read(scope, receive)
        if body is None:
            return receive
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            if message is None:
                return await receive()
            first, message = message, None
            return first

        return replay


def request_id(headers: Headers) -> str:
    """The client's own id of its request where that is harmless, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(12)


def admitted(settings: Settings, keyless: frozenset[str], scope: Scope) -> str | None:
    """Whose key a request has, where it needs one. Raises ApiError: 421 for a strange host, 401 without a known key.

    keyless: paths beside :data:`OPEN` that need none.
    """
    headers, path = Headers(scope=scope), scope["path"]
    if settings.hosts and _host(headers.get("host", "")) not in settings.hosts:
        raise ApiError(421, "host: this name is not served here", code="unknown_host")
    if settings.keys is None or path in OPEN | keyless or scope["method"] == "OPTIONS":
        return None
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    owner = settings.keys.owner(key) if key else None
    if owner is None:
        raise ApiError(
            401,
            "API key: it is no key of this server's" if key else "API key: none given (Authorization: Bearer KEY)",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.rsplit(":", 1)[0] if re.search(r":\d*$", header) else header
    return name.strip("[]").lower()
