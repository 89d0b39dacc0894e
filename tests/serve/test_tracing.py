"""Spans, in OpenTelemetry's own exporter for tests: names, numbers, the caller's trace, and no text."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from glm4export import cli
from glm4runtime.contract import UserError
from glm4serve.tracing import Traces, check_endpoint
from tests.helpers.asgi import ASK, CHAT, ask
from tests.helpers.fake_engine import words
from tests.helpers.small_bundles import fill
from tests.serve.conftest import Serve

SECRET = "xyzzy"


def traced(app: Any) -> Any:
    """The exporter of an application's spans."""
    exporter = InMemorySpanExporter()
    app.state.service.traces = Traces(exporter)
    return exporter


def spans(app: Any, exporter: Any) -> list[Any]:
    app.state.service.traces.flush()
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span(serve: Serve, stream: bool) -> None:
    app, _ = serve(words("a", "b", SECRET))
    exporter = traced(app)
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {
        "messages": [{"role": "user", "content": SECRET}],
        "stream": stream,
        "temperature": 0.5,
        "max_tokens": 7,
        "user": SECRET,
    }
    ask(app, CHAT, body, headers={"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "r1"})
    (span,) = spans(app, exporter)
    assert span.name == "chat m" and span.kind.name == "SERVER" and span.status.status_code.name == "UNSET"
    assert f"{span.context.trace_id:032x}" == trace and f"{span.parent.span_id:016x}" == parent
    found = dict(span.attributes)
    assert {name: found[name] for name in found if "latency" not in name and "input_tokens" not in name} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "glm4export",
        "gen_ai.request.id": "r1",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
    }
    assert found["gen_ai.usage.input_tokens"] > 3 and found["gen_ai.usage.cache_read.input_tokens"] == 0
    assert 0 <= found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
    assert span.end_time - span.start_time == pytest.approx(found["gen_ai.latency.e2e"] * 1e9, abs=1e6)
    assert SECRET not in span.to_json()


def test_what_went_wrong(serve: Serve) -> None:
    app, _ = serve(words("a", reason="timeout"))
    exporter = traced(app)
    ask(app, CHAT, {**ASK, "max_tokens": SECRET})
    ask(app, CHAT, {**ASK, "model": "other"})
    ask(app, CHAT, ASK)
    ask(app, CHAT, {**ASK, "stream": True})
    ask(app, "/health")
    ask(app, "/nowhere")
    found = [
        (span.attributes["http.response.status_code"], span.attributes["error.type"], span.status.status_code.name)
        for span in spans(app, exporter)
    ]
    assert found == [
        (400, "400", "UNSET"),
        (404, "404", "UNSET"),
        (504, "504", "ERROR"),
        (200, "timeout", "ERROR"),
    ]


def test_the_log_names_the_trace(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app, _ = serve(words("a"))
    with caplog.at_level(logging.INFO, "glm4serve"):
        ask(app, CHAT, ASK)
        exporter = traced(app)
        ask(app, CHAT, ASK)
    before, after = [record.fields for record in caplog.records if record.message == "request"]
    assert "trace" not in before and re.fullmatch("[0-9a-f]{32}", after["trace"])
    assert f"{spans(app, exporter)[0].context.trace_id:032x}" == after["trace"]
    json.dumps(after)


def test_an_address_that_is_none(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "bundle")
    assert cli.main(["serve", str(tmp_path / "bundle"), "--otlp-endpoint", "localhost:4318"]) == 2
    told = "--otlp-endpoint localhost:4318 (by default OTEL_EXPORTER_OTLP_ENDPOINT's): expected http:// or https://"
    assert told in capsys.readouterr().err


def test_an_environment_s_address_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole clusters have the variable: who is refused has to know where that comes from, and how to go on."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT's\): OpenTelemetry is not .*-endpoint '' for no"):
        check_endpoint("http://collector:4318")


def test_switched_off_by_opentelemetry_s_own_variable(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    app, _ = serve(words("a"))
    exporter = traced(app)
    with caplog.at_level(logging.INFO, "glm4serve"):
        ask(app, CHAT, ASK)
    assert not spans(app, exporter)
    assert "trace" not in caplog.records[-1].fields  # type: ignore[attr-defined]
