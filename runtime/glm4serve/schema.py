"""Bodies of requests: read once, strictly, and unknown fields refused."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response


class Strict(BaseModel):
    """A JSON object with these fields and no others; no value is converted into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class _JsonRequest(Request):
    async def json(self) -> Any:
        """The body. Unlike Python's reader, this one has a limit of depth (200), and refuses NaN and lone surrogates.

        Raises JSONDecodeError for what is no JSON, which FastAPI knows.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from error


class JsonRoute(APIRoute):
    """A route whose body is read so; give it to routers as ``route_class``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook."""
        handle = super().get_route_handler()

        async def with_our_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return with_our_json
