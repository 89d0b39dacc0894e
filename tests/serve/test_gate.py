from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from glm4runtime.contract import UserError
from glm4runtime.engine import RequestFailed
from glm4serve import Settings, logs
from glm4serve.keys import Keys
from tests.helpers.asgi import ASK, CHAT, ask
from tests.helpers.fake_engine import words
from tests.serve.conftest import Serve

JSON = {"content-type": "application/json"}


def keys(tmp_path: Path, text: str) -> Keys:
    (tmp_path / "keys").write_text(text)
    return Keys.from_file(tmp_path / "keys")


def test_keys(serve: Serve, tmp_path: Path) -> None:
    """Their owners take turns in the engine; health needs none; no answer holds a key."""
    first, second = "a" * 20, "b" * 20
    settings = Settings(keys=keys(tmp_path, f"# ours\nann {first}\n{second}  # nameless\n"))
    app, engine = serve(words("x"), settings)
    for headers in ({}, {"authorization": "Bearer " + "c" * 20}, {"authorization": first}, {"x-api-key": ""}):
        response = ask(app, CHAT, ASK, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert "c" * 20 not in response.text
    assert ask(app, CHAT, ASK, headers={"authorization": f"Bearer {first}"}).status_code == 200
    assert ask(app, CHAT, ASK, headers={"x-api-key": second}).status_code == 200
    assert [request.key for request in engine.requests] == ["ann", "key2"]
    assert ask(app, "/health").status_code == ask(app, "/ready").status_code == 200
    assert ask(app, "/metrics").status_code == ask(app, "/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "none given"),
        ("short", "number 1 .key1. has 5 characters, expected at least 16"),
        ("a b c", "line 1: expected KEY or NAME KEY, found 3 words"),
        ("ann " + "x" * 20 + "\n" + "x" * 20, "line 2: this key is there twice"),
    ],
)
def test_a_file_that_holds_no_keys(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        keys(tmp_path, text)
    assert "x" * 20 not in str(raised.value)


def test_bodies(serve: Serve) -> None:
    app, engine = serve(words("x"), Settings(body_limit=1000))

    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100

    large = ask(app, CHAT, b"{" + b" " * 2000, headers=JSON)
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    assert ask(app, CHAT, method="POST", content=chunks(), headers=JSON).status_code == 413  # no length was told
    bad = [b"", b"{", b"[]", b"nothing", b'"\xff"', b'{"messages": NaN}', b"[" * 900, b'{"a": "\\ud800"}']
    for body in bad:
        response = ask(app, CHAT, body, headers=JSON, method="POST")
        assert response.status_code == 400 and response.json()["error"]["message"], body
    assert not engine.requests


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"content-type": "text/plain"}, "content-type: expected application/json, found text/plain"),
        ({"content-type": "application/x-www-form-urlencoded"}, "found application/x-www-form-urlencoded"),  # curl -d
        ({}, "content-type: expected application/json, found none"),
        ({**JSON, "content-encoding": "gzip"}, "content-encoding: expected none, found 'gzip'"),
    ],
)
def test_bodies_that_are_told_to_be_something_else(serve: Serve, headers: dict[str, str], told: str) -> None:
    """A page elsewhere may send forms and plain text without asking first."""
    app, engine = serve(words("x"))
    for path in (CHAT, "/v1/messages", "/tokenize"):
        response = ask(app, path, json.dumps(ASK).encode(), headers=headers)
        assert response.status_code == 415 and told in response.json()["error"]["message"]
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        assert ask(app, CHAT, json.dumps(ASK).encode(), headers={"content-type": kind}).status_code == 200
    assert len(engine.requests) == 3


def test_heads_are_gets_without_a_body(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Balancers and Claude Code ask so whether anybody is there."""
    caplog.set_level(logging.INFO, "glm4serve")
    app, _ = serve()
    for path in ("/", "/health", "/ready", "/v1/models", "/v1/nothing", CHAT):
        whole, head = ask(app, path), ask(app, path, method="HEAD")
        assert head.status_code == whole.status_code and head.content == b""
        if path != "/health":  # which tells a time
            assert head.headers["content-length"] == whole.headers["content-length"]
    assert [record.fields["method"] for record in caplog.records] == ["GET", "HEAD"] * 6  # type: ignore[attr-defined]


def test_ids_of_requests(serve: Serve) -> None:
    """A client's own where it's harmless; by OpenAI's name and by Anthropic's."""
    app, _ = serve()
    for given, taken in (("a-1.B_2", True), ("caf\xe9", False), ("a b", False), ("a" * 129, False), ("", False)):
        headers = ask(app, "/health", headers={"x-request-id": given.encode("latin-1")}).headers
        assert headers["request-id"] == headers["x-request-id"]
        assert (headers["request-id"] == given) == taken and headers["request-id"].isascii()


def test_what_is_refused_in_front_of_its_route_is_told_by_its_path(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log and in metrics; whatever else is asked for is one path there."""
    caplog.set_level(logging.INFO, "glm4serve")
    app, _ = serve((), Settings(keys=keys(tmp_path, "a" * 20), body_limit=10))
    ask(app, CHAT, ASK)
    ask(app, CHAT, ASK, headers={"x-api-key": "a" * 20})
    ask(app, "/v1/messages/count_tokens", ASK)
    ask(app, "/v1/models/secret", headers={"x-api-key": "b" * 20})
    ask(app, "/a-path-of-my-own", ASK)
    told = [(record.fields["path"], record.fields["status"]) for record in caplog.records]  # type: ignore[attr-defined]
    counted, other = "/v1/messages/count_tokens", "(other)"
    assert told == [(CHAT, 401), (CHAT, 413), (counted, 401), (other, 401), (other, 401)]
    metrics = ask(app, "/metrics", headers={"x-api-key": "a" * 20}).text
    assert f'glm4:http_responses_total{{path="{CHAT}",status="413"}} 1.0' in metrics and "my-own" not in metrics


def test_bodies_of_all_requests_together(serve: Serve) -> None:
    """Each stays in memory until its answer's end, so they have a limit; what has ended makes room."""
    app, engine = serve(words("x"), Settings(bodies_limit=1500))
    body = json.dumps({**ASK, "user": "a" * 900}).encode()

    async def both() -> tuple[httpx.Response, httpx.Response]:
        waits, ends = asyncio.Event(), asyncio.Event()

        async def first() -> Any:
            yield body
            waits.set()
            await ends.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            slow = asyncio.ensure_future(client.post(CHAT, content=first(), headers=JSON))
            await waits.wait()
            refused = await client.post(CHAT, content=body, headers=JSON)
            ends.set()
            return refused, await slow

    refused, whole = asyncio.run(both())
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert refused.headers["retry-after"] == "1" and whole.status_code == 200
    assert ask(app, CHAT, body, headers=JSON).status_code == 200 and len(engine.requests) == 2


def test_a_body_that_does_not_come(serve: Serve) -> None:
    app, _ = serve(words("x"), Settings(body_timeout=0.05))

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    assert ask(app, CHAT, method="POST", content=slow(), headers=JSON).status_code == 408


def test_other_names_of_this_machine(serve: Serve) -> None:
    app, _ = serve(words("x"), Settings(hosts=("localhost", "::1")))
    for host, status in (("localhost:80", 200), ("[::1]:8000", 200), ("evil.example", 421), ("localhost.evil", 421)):
        assert ask(app, CHAT, ASK, headers={"host": host}).status_code == status, host


def test_pages_elsewhere(serve: Serve) -> None:
    """No page may read answers, but those that the settings name."""
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    app, _ = serve(words("x"))
    assert "access-control-allow-origin" not in ask(app, CHAT, ASK, headers=asked).headers
    app, _ = serve(words("x"), Settings(cors_origins=("https://page.example",)))
    assert ask(app, CHAT, method="OPTIONS", headers=asked).headers["access-control-allow-origin"] == asked["origin"]
    assert ask(app, CHAT, method="OPTIONS", headers={**asked, "origin": "https://evil.example"}).status_code == 400
    told = ask(app, CHAT, ASK, headers=asked).headers["access-control-expose-headers"]
    assert {"x-request-id", "retry-after"} <= set(told.split(", "))  # which clients in a page read


def test_while_it_drains(serve: Serve) -> None:
    app, engine = serve(words("x"))
    app.state.service.draining = True
    response = ask(app, CHAT, ASK)
    assert response.status_code == 503 and response.json()["error"]["code"] == "service_unavailable"
    assert ask(app, "/ready").status_code == 503 and ask(app, "/health").status_code == 200
    assert not engine.requests


def test_paths_that_there_are_not(serve: Serve) -> None:
    app, _ = serve()
    assert ask(app, "/v1/nothing").json()["error"]["code"] == "not_found"
    assert ask(app, CHAT).json()["error"]["code"] == "method_not_allowed"


def test_a_fault_of_ours_is_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Also one that came while a request was made ready."""
    app, engine = serve()
    engine.submit = lambda request: [][1]  # type: ignore[assignment, method-assign]
    with caplog.at_level(logging.ERROR, "glm4serve"):
        assert ask(app, CHAT, ASK).json()["error"]["code"] == "internal_error"
    [record] = [record for record in caplog.records if record.message == "failure"]
    assert record.fields["error"] == "IndexError" and "test_gate.py" in record.fields["places"][-1]  # type: ignore[attr-defined]


def test_the_log_has_no_texts(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "glm4serve")
    app, _ = serve(words("SECRET"))
    messages = [{"role": "user", "content": "SECRET"}]
    response = ask(app, CHAT, {"messages": messages}, headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    ask(app, CHAT, {"messages": messages, "SECRET": 1}, headers={"x-request-id": "no spaces"})
    failed = RequestFailed("the request failed: ValueError: SECRET")
    failed.__cause__ = ValueError("SECRET")
    app, _ = serve(words("SECRET"), error=failed)
    ask(app, CHAT, {"messages": messages})
    lines = [json.loads(logs.JsonLines().format(record)) for record in caplog.records if record.name == "glm4serve"]
    assert "SECRET" not in str(lines)
    assert lines[0]["id"] == "abc-1" and lines[0]["status"] == 200 and lines[0]["completion_tokens"] == 1
    assert lines[0]["finish_reasons"] == ["stop"] and lines[0]["prompt_tokens"] > 3
    assert lines[1]["status"] == 400 and len(lines[1]["id"]) == 24
    assert any(line["event"] == "failure" and line["error"] == "ValueError" for line in lines)
