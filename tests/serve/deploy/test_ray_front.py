"""The front before replicas that are told what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from glm4serve import Settings
from glm4serve.deploy.ray_front import Front
from tests.helpers.asgi import ASK, CHAT, ask, events

JSON, EVENTS = b"application/json", b"text/event-stream; charset=utf-8"


class Dead(Exception):
    pass


WAIT = "for ever"


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
        assert answer.status_code == 404 and "each replica has its own" in answer.json()["error"]["message"]
    assert not asked


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
