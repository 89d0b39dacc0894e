"""Errors as responses, each protocol's in its own form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from glm4serve.errors import ApiError, openai_shape

Shape = Callable[[ApiError], dict[str, Any]]

#: Whose form an error has, by how the path begins; OpenAI's where none fits.
SHAPES: dict[str, Shape] = {}


def respond(path: str, error: ApiError) -> JSONResponse:
    """The error as this path's protocol gives it."""
    shape = next((shape for start, shape in SHAPES.items() if path.startswith(start)), openai_shape)
    return JSONResponse(shape(error), error.status, error.headers)
