"""What the parts of a service share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request as HttpRequest

from glm4runtime.encoder import Encoder
from glm4serve.metrics import Metrics
from glm4serve.models import Models
from glm4serve.settings import Settings
from glm4serve.tracing import Traces

if TYPE_CHECKING:
    from glm4runtime.engine import Engine


class Cancellable(Protocol):
    """Answers under way."""

    def cancel(self) -> None:
        """End them, and tell whom they are for."""


class Service:
    """Models, limits and numbers of one application."""

    def __init__(self, served: Mapping[str, Engine | Encoder], settings: Settings) -> None:
        """Raises UserError where nothing is served, or traces are wanted and OpenTelemetry isn't installed."""
        self.settings = settings
        self.traces = None if settings.otlp_endpoint is None else Traces.over_http(settings.otlp_endpoint)
        self.models = Models(served, queue=settings.embedding_queue)
        self.metrics = Metrics(self.models)
        self.started = int(time.time())
        self.draining = False  # no more requests are taken
        self.in_flight = 0  # requests that are not yet answered, but for those for health
        self.runs: set[Cancellable] = set()

    def abort(self) -> None:
        """End every answer under way; their clients are told."""
        for run in list(self.runs):
            run.cancel()

    def close(self) -> None:
        """End our threads. Engines and encoders are the caller's."""
        for embedder in self.models.embedders.values():
            embedder.close()
        if self.traces is not None:
            self.traces.close()


def service_of(http: HttpRequest) -> Service:
    """The service whose application got this request."""
    service: Service = http.app.state.service
    return service


def owner_of(http: HttpRequest) -> str:
    """The name of the key that a request came with; empty where none is asked for."""
    owner: str = http.scope.get("glm4.owner", "")
    return owner


def note(http: HttpRequest, **fields: object) -> None:
    """Add fields to the request's line in the log. Never texts."""
    http.scope.setdefault("glm4.log", {}).update(fields)
