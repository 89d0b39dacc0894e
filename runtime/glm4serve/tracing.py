"""A span for each answered request, for a collector of OpenTelemetry's that the user names: numbers, never texts.

Names are those of OpenTelemetry's conventions for generative AI, and vLLM's for what they don't have.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm4runtime.contract import UserError, installing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_CLOSE = 3.0  # seconds in which the last spans have to be taken
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_WHOSE = " (by default OTEL_EXPORTER_OTLP_ENDPOINT's)"  # which whole clusters set, and nobody remembers
#: Attributes by the names that fields have in the log.
_ATTRIBUTES = {
    "id": ("gen_ai.request.id",),
    "model": ("gen_ai.request.model", "gen_ai.response.model"),
    "n": ("gen_ai.request.choice.count",),
    "max_tokens": ("gen_ai.request.max_tokens",),
    "temperature": ("gen_ai.request.temperature",),
    "top_p": ("gen_ai.request.top_p",),
    "prompt_tokens": ("gen_ai.usage.input_tokens",),
    "cached_tokens": ("gen_ai.usage.cache_read.input_tokens",),
    "completion_tokens": ("gen_ai.usage.output_tokens",),
    "finish_reasons": ("gen_ai.response.finish_reasons",),
    "queue_seconds": ("gen_ai.latency.time_in_queue",),
    "first_token_seconds": ("gen_ai.latency.time_to_first_token",),
    "seconds": ("gen_ai.latency.e2e",),
    "method": ("http.request.method",),
    "path": ("http.route",),
    "status": ("http.response.status_code",),
}


def check_endpoint(endpoint: str) -> None:
    """Raises UserError where it's no address for HTTP, or OpenTelemetry isn't installed."""
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(
            f"--otlp-endpoint {endpoint}{_WHOSE}: expected http:// or https://, such as http://localhost:4318"
        )
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--otlp-endpoint {endpoint}{_WHOSE}: OpenTelemetry is not installed ({error}); {installing('otel')}, "
            "or give --otlp-endpoint '' for no traces"
        ) from None


class Traces:
    """Spans on their way. They are sent by a thread of OpenTelemetry's, and left out where they can't be."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "glm4export")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(exporter)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("glm4serve")

    @classmethod
    def over_http(cls, endpoint: str) -> Traces:
        """To a collector's address for OTLP over HTTP, ``/v1/traces`` left out.

        Its headers and TLS are set by OpenTelemetry's own environment variables. Raises as :func:`check_endpoint`.
        """
        check_endpoint(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return cls(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_CLOSE))

    def record(self, headers: Mapping[str, str], fields: Mapping[str, Any]) -> str | None:
        """A request that ended now, by its fields in the log; returns its trace's id. None for what has none: it asks
        no model, or OpenTelemetry is switched off.

        headers: the request's, of which ``traceparent`` names the caller's span.
        """
        operation = _OPERATIONS.get(fields["path"])
        if operation is None:
            return None
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {fields['model']}" if "model" in fields else operation,
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {"gen_ai.operation.name": operation, "gen_ai.provider.name": "glm4export", **_attributes(fields)},
            start_time=end - int(fields["seconds"] * 1e9),
        )
        if "error" in fields or fields["status"] >= 400:
            span.set_attribute("error.type", str(fields.get("error") or fields["status"]))
            if fields["status"] >= 500 or "error" in fields:
                span.set_status(StatusCode.ERROR)
        span.end(end)
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid else None  # none where OTEL_SDK_DISABLED is set

    def flush(self) -> None:
        """Send what is there, and wait for it."""
        self._processor.force_flush()

    def close(self) -> None:
        """Send what is there, in a few seconds; what isn't taken by then is lost."""
        thread = threading.Thread(target=self._provider.shutdown, name="glm4-traces", daemon=True)
        thread.start()
        thread.join(_CLOSE)


def _attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, names in _ATTRIBUTES.items():
        if fields.get(field) is not None:
            found.update(dict.fromkeys(names, fields[field]))
    return found
