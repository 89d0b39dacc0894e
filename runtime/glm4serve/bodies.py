"""Requests' bodies: read whole, each within its limits, and all that are held within those of memory."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from glm4serve.errors import ApiError, queue_full
from glm4serve.settings import Settings

_CLOSE = {"Connection": "close"}  # the rest of a body that wasn't read would be taken for the next request
_HELD = "glm4.held"  # bytes, in a request's scope


class Bodies:
    """Of one process: each body counts from its first part to its request's end, when it is :meth:`let_go`."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._held = settings, 0

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's whole body; None where it has none.

        Raises ApiError: 408 where it doesn't come in time, 413 where it is too large, 415 where it is compressed, 429
        where there is no room for it beside the others, 499 where the client went away.
        """
        headers, limit = Headers(scope=scope), self._settings.body_limit
        coding = headers.get("content-encoding", "")
        if coding.lower() not in ("", "identity"):
            refusal = f"content-encoding: expected none, found {coding[:100]!r}; send the body as it is"
            raise ApiError(415, refusal, code="unsupported_media_type", headers=_CLOSE)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        if not length and "transfer-encoding" not in headers and scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        try:
            with anyio.fail_after(self._settings.body_timeout):
                return await self._whole(scope, receive)
        except TimeoutError:
            raise ApiError(408, "body: it didn't come in time", code="timeout", headers=_CLOSE) from None

    def let_go(self, scope: Scope) -> None:
        """The request has ended, whether its body was read or not."""
        self._held -= scope.pop(_HELD, 0)

    async def _whole(self, scope: Scope, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client went away", code="client_gone")
            parts.append(self._hold(scope, message))
            size += len(parts[-1])
            if size > self._settings.body_limit:
                raise _too_large(self._settings.body_limit)
            if not message.get("more_body"):
                return b"".join(parts)

    def _hold(self, scope: Scope, message: Message) -> bytes:
        part: bytes = message.get("body", b"")
        scope[_HELD] = scope.get(_HELD, 0) + len(part)
        self._held += len(part)
        most = self._settings.bodies_limit
        if self._held > most:
            error = queue_full(f"body: with those of other requests it is more than {most} bytes", 1)
            error.headers.update(_CLOSE)
            raise error
        return part


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"body: expected at most {limit} bytes", code="body_too_large", headers=_CLOSE)
