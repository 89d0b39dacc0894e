"""The front before replicas that are told what to do."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from glm4serve import Settings
from glm4serve.deploy import ray_front
from glm4serve.deploy.ray_front import Front
from glm4serve.keys import Keys
from tests.helpers.asgi import ASK, CHAT, ask, events

JSON, EVENTS = b"application/json", b"text/event-stream; charset=utf-8"


class Dead(Exception):
    pass


WAIT, PAUSE, LEFT = "for ever", "longer than a request may take", "for ever, and then with an error"


class Replica:
    """Answers one request with these (head or None, message) pairs, and dies where there is an exception."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps, self.cancelled = iter(steps), False

    def __aiter__(self) -> Replica:
        return self

    async def __anext__(self) -> Any:
        step = next(self.steps, None)
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, BaseException):
            raise step
        if step is WAIT:
            await asyncio.Event().wait()
        if step is LEFT:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise Dead from None
        if step is PAUSE:
            await asyncio.sleep(0.1)
            return await self.__anext__()
        return step

    def cancel(self) -> None:
        self.cancelled = True


def head(kind: bytes, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def part(text: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


def front(*answers: Sequence[Any], settings: Settings | None = None) -> tuple[Front, list[Any], list[Replica]]:
    asked: list[Any] = []
    replicas = [Replica(steps) for steps in answers]

    def send(*arguments: Any) -> Replica:
        asked.append(arguments)
        return replicas[len(asked) - 1]

    return Front(send, (Dead,), settings or Settings()), asked, replicas


def test_a_request_is_passed_on_whole() -> None:
    app, asked, replicas = front([(head(JSON, 429), part(b'{"a": 1}'))])
    answer = ask(app, CHAT, ASK, headers={"authorization": "Bearer k"})
    assert answer.status_code == 429 and answer.json() == {"a": 1}
    ((blocks, scope, body),) = asked
    assert len(blocks) == 1 and b'"Hi"' in body and scope["path"] == CHAT
    assert (b"authorization", b"Bearer k") in scope["headers"] and "extensions" not in scope
    assert replicas[0].cancelled  # nothing goes on there


@pytest.mark.parametrize("kind", [JSON, EVENTS])
def test_nothing_was_answered_yet(kind: bytes) -> None:
    """It is asked again."""
    app, asked, _ = front([Dead()], [Dead()], [(head(kind), part(b"whole"))])
    answer = ask(app, CHAT, ASK)
    assert answer.status_code == 200 and answer.text == "whole" and asked[0] == asked[1] == asked[2]


def test_every_replica_dies() -> None:
    app, asked, _ = front(*[[Dead()]] * 3)
    answer = ask(app, CHAT, ASK)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and len(asked) == 3
    assert answer.json()["error"]["message"] == "the replicas that had this request died"


def test_a_stream_that_began_says_that_it_broke() -> None:
    first = b'data: {"n": 1}\n\n'
    app, asked, _ = front([(head(EVENTS), part(first, True)), Dead()])
    answer = ask(app, CHAT, ASK)
    one, last = events(answer)
    assert answer.status_code == 200 and one == {"n": 1} and len(asked) == 1
    assert last["error"]["code"] == "service_unavailable" and "not the whole" in last["error"]["message"]


def test_other_errors_are_not_asked_again() -> None:
    app, asked, replicas = front([ValueError("ours")])
    assert ask(app, CHAT, ASK).status_code == 500 and len(asked) == 1 and replicas[0].cancelled


def test_what_a_front_refuses_itself() -> None:
    app, asked, _ = front(settings=Settings(body_limit=10))
    assert ask(app, CHAT, b"x" * 11).status_code == 413
    for path in ("/metrics", "/slots"):
        answer = ask(app, path)
        error = answer.json()["error"]
        assert answer.status_code == 404 and "each replica has its own" in error["message"]
        assert error["code"] == "not_found"
    assert not asked


def test_what_a_front_refuses_has_its_id_and_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """No replica logs it; and the connection ends where a body is left unread on it."""
    app, _, _ = front(settings=Settings(body_limit=10))
    with caplog.at_level("INFO", "glm4serve"):
        answer = ask(app, CHAT, b"x" * 11, headers={"x-request-id": "a-1"})
    assert answer.headers["request-id"] == "a-1" and answer.headers["connection"] == "close"
    (record,) = caplog.records
    told = {"id": "a-1", "method": "POST", "path": CHAT, "status": 413}
    assert record.fields == told  # type: ignore[attr-defined]


def test_bodies_are_refused_by_what_their_heads_say() -> None:
    app, asked, _ = front(settings=Settings(body_limit=10, body_timeout=60))

    async def never() -> AsyncIterator[bytes]:
        pytest.fail("it was read")
        yield b""

    for name, status in (("content-length", 413), ("content-encoding", 415)):
        told = {"content-length": "5", name: {"content-length": "11", "content-encoding": "gzip"}[name]}
        assert ask(app, CHAT, method="POST", content=never(), headers=told).status_code == status
    assert not asked


def test_bodies_of_all_requests_together() -> None:
    """A front holds each until its answer's end, since another replica may have to be asked."""
    app, asked, replicas = front([WAIT], [(head(JSON), part(b"{}"))], settings=Settings(bodies_limit=150))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post(CHAT, content=b"x" * 100))
            while not asked:
                await asyncio.sleep(0)
            refused = await client.post(CHAT, content=b"x" * 100)
            first.cancel()
            await asyncio.wait({first})
            return [each.status_code for each in (refused, await client.post(CHAT, content=b"x" * 100))]

    assert asyncio.run(run()) == [429, 200] and len(asked) == 2 and replicas[0].cancelled


@pytest.mark.parametrize("begun", [False, True])
def test_the_end_is_told(begun: bool) -> None:
    """Of the service, to a client whose answer isn't done in time; and to those that come later."""
    steps = [(head(EVENTS), part(b'data: {"n": 1}\n\n', True))] if begun else []
    app, _, replicas = front([*steps, WAIT])

    async def run() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post(CHAT, json=ASK))
            await asyncio.sleep(0.05)
            drained = asyncio.create_task(app.drain(0.05))
            await asyncio.sleep(0.01)
            late = await client.post(CHAT, json=ASK)
            await drained
            return await first, late

    answer, late = asyncio.run(run())
    assert late.status_code == 503 and late.json()["error"]["message"] == "the server is being shut down"
    if begun:
        one, last = events(answer)
        assert one == {"n": 1} and "is being shut down; what came is not the whole" in last["error"]["message"]
    else:
        assert answer.status_code == 503
    assert replicas[0].cancelled


def test_an_end_that_waits_for_nobody() -> None:
    app, _, _ = front()
    asyncio.run(asyncio.wait_for(app.drain(60), 5))


def test_requests_without_a_key_cost_no_replica_anything() -> None:
    key = "k-0123456789abcdef"
    app, asked, _ = front([(head(JSON), part(b"{}"))], settings=Settings(keys=Keys({key: "ann"}), body_limit=10))
    for headers in ({}, {"authorization": "Bearer nobody's-own-key"}):
        answer = ask(app, CHAT, b"x" * 99, headers=headers)  # refused unread
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert ask(app, "/metrics").status_code == 401 and not asked
    assert ask(app, CHAT, b"{}", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_the_page_and_balancers_need_no_key() -> None:
    keys = Keys({"k-0123456789abcdef": "ann"})
    app, asked, _ = front(*[[(head(JSON), part(b"{}"))]] * 3, settings=Settings(keys=keys))
    assert [ask(app, path).status_code for path in ("/", "/health", "/ready")] == [200] * 3 and len(asked) == 3


def test_a_strange_host() -> None:
    app, asked, _ = front(settings=Settings(hosts=("localhost",)))
    assert ask(app, CHAT, ASK, headers={"host": "evil.example"}).status_code == 421 and not asked


def test_pages_elsewhere_can_read_what_a_front_refuses() -> None:
    app, _, _ = front(settings=Settings(cors_origins=("https://a.example",), body_limit=10))
    answer = ask(app, CHAT, b"x" * 11, headers={"origin": "https://a.example"})
    assert answer.status_code == 413 and answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize(("path", "status"), [("/ready", 503), ("/health", 503), (CHAT, 504)])
def test_no_replica_is_there(path: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A balancer is told soon, a client once its request's time is over."""
    monkeypatch.setattr(ray_front, "_LATE", 0.01)
    app, asked, replicas = front([WAIT], settings=Settings(request_timeout=0.01))
    answer = ask(app, path, ASK if path == CHAT else None)
    assert answer.status_code == status and len(asked) == 1 and replicas[0].cancelled
    assert (answer.headers.get("x-should-retry") == "false") == (status == 504)  # clients would, twice, by themselves


def test_an_answer_that_has_begun_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replica ends it."""
    monkeypatch.setattr(ray_front, "_LATE", 0.0)
    steps = [(head(EVENTS), part(b"a", True)), PAUSE, (None, part(b"b"))]
    app, _, _ = front(steps, settings=Settings(request_timeout=0.05))
    assert ask(app, CHAT, ASK).text == "ab"


def test_health_while_it_drains() -> None:
    """Whoever asks whether it lives is told so; it takes no requests."""
    app, _, _ = front([(head(JSON), part(b"{}"))])
    asyncio.run(app.drain(0))
    assert [ask(app, path).status_code for path in ("/health", "/ready", "/v1/models")] == [200, 503, 503]


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"messages": ' + b"[" * 100_000])
def test_bodies_that_are_too_deep_are_the_replicas_to_refuse(body: bytes) -> None:
    app, asked, _ = front([(head(JSON, 400), part(b"{}"))])
    assert ask(app, CHAT, body).status_code == 400 and asked[0][0] == ()


def test_what_a_front_tells_is_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes it in a process of its own, where nobody else sets our log up."""
    made: list[bool] = []
    monkeypatch.setattr(ray_front.logs, "configure", lambda: made.append(True))
    ray_front.build(lambda *_: Replica([]), (Dead,), Settings())
    assert made


def test_a_client_that_goes_away_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Ray raises where a request was cancelled."""
    app, _, replicas = front([LEFT])

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            task = asyncio.create_task(client.post(CHAT, json=ASK))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait({task})
        await asyncio.sleep(0)
        gc.collect()

    with caplog.at_level("ERROR", "asyncio"):
        asyncio.run(run())
    assert replicas[0].cancelled and not caplog.records
