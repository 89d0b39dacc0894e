"""Bundles as a service over HTTP: OpenAI's API and others' over :class:`glm4runtime.Engine`.

>>> from glm4runtime import Engine
>>> from glm4serve import create_app
>>> app = create_app({"glm-4-9b": Engine.load("glm-4-9b", slots=8)})  # an ASGI application

``glm4export serve`` runs it under uvicorn. A request's way: :mod:`glm4serve.gate` (key, limits), a protocol's module
(``openai.chat``, ...) that makes an engine's Request of it, :mod:`glm4serve.answering` (the engine, the client's
leaving), and the same protocol's writer, which makes its form of the deltas.
"""

from glm4serve.app import create_app
from glm4serve.settings import Settings

__all__ = ["Settings", "create_app"]
