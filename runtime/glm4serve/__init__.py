"""Bundles as a service over HTTP: OpenAI's API and others' over :class:`glm4runtime.Engine`.

>>> from glm4runtime import Engine
>>> from glm4serve import create_app
>>> app = create_app({"glm-4-9b": Engine.load("glm-4-9b", slots=8)})  # an ASGI application

``glm4export serve`` runs it under uvicorn. A request's way: :mod:`glm4serve.gate` (key, limits), a protocol's module
(``openai.chat``, ...) that makes an engine's Request of it, :mod:`glm4serve.answering` (the engine, the client's
leaving), and the same protocol's writer, which makes its form of the deltas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glm4serve.settings import Settings

if TYPE_CHECKING:
    from glm4serve.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    """FastAPI is imported by those who want the application: ``glm4serve.batch`` does without."""
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from glm4serve.app import create_app

    return create_app
