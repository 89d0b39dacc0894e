"""Routes whose bodies are JSON, read once, and strictly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from glm4serve.errors import ApiError
from glm4serve.schema import read_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        """The body, as :func:`glm4serve.schema.read_json` reads it. Raises JSONDecodeError, which FastAPI knows."""
        try:
            return read_json(await self.body())
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from error


class JsonRoute(APIRoute):
    """A route whose body is read so; give it to routers as ``route_class``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook."""
        handle = super().get_route_handler()

        async def with_our_json(request: Request) -> Response:
            _check_type(request.headers.get("content-type", ""))
            return await handle(_JsonRequest(request.scope, request.receive))

        return with_our_json


def _check_type(given: str) -> None:
    """Raises ApiError. Forms and plain text are what pages elsewhere may send without asking first."""
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"content-type: expected application/json, found {kind[:100] or 'none'}"
        raise ApiError(415, message, code="unsupported_media_type", param="content-type")
