"""Clients that go away, or don't read: what was computed for them ends."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from glm4serve import Settings
from tests.helpers.asgi import ASK, CHAT, leave
from tests.helpers.fake_engine import FakeEngine, words
from tests.serve.conftest import Serve

LONG = words(*["a "] * 2000)


def ended(engine: FakeEngine) -> bool:
    """Whether the engine was told to stop, and has, long before the answer's end."""
    deadline = time.monotonic() + 30
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    return not engine.running and all(feed.cancelled for feed in engine.feeds)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away(serve: Serve, path: str, stream: bool) -> None:
    app, engine = serve(LONG, pause=0.02)
    body = {**ASK, "stream": stream} if path == CHAT else {"prompt": ["a", "b"], "stream": stream}

    async def begun(messages: list[Any]) -> bool:
        return bool(engine.feeds) and all(feed.usage.completion_tokens >= 2 for feed in engine.feeds)

    messages = leave(app, path, body, begun)
    assert ended(engine) and all(feed.usage.completion_tokens < 1000 for feed in engine.feeds)
    assert app.state.service.in_flight == 0 and not app.state.service.runs
    if stream:
        assert not any(message.get("more_body") is False for message in messages)  # it wasn't told that this is all


def test_a_client_that_does_not_read(serve: Serve) -> None:
    app, engine = serve(LONG, Settings(write_timeout=0.1), pause=0.01)

    async def never(messages: list[Any]) -> bool:
        return False

    sent = 0

    async def stuck(message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent > 3:
            await asyncio.sleep(60)

    leave(app, CHAT, {**ASK, "stream": True}, never, send=stuck)
    assert ended(engine) and app.state.service.in_flight == 0


def test_silence_is_broken(serve: Serve) -> None:
    """So that what stands between doesn't take the connection for dead."""
    app, _ = serve(words("a", "b"), Settings(ping=0.05), pause=0.2)

    async def done(messages: list[Any]) -> bool:
        return any(message.get("more_body") is False for message in messages)

    bodies = b"".join(message.get("body", b"") for message in leave(app, CHAT, {**ASK, "stream": True}, done))
    assert b": waiting\n\n" in bodies and bodies.endswith(b"data: [DONE]\n\n")


def test_the_server_ends_answers(serve: Serve) -> None:
    """What a drain does with those that are left."""
    app, engine = serve(LONG, pause=0.02)
    told = False

    async def abort(messages: list[Any]) -> bool:
        nonlocal told
        if len(messages) > 4 and not told:
            told = True
            app.state.service.abort()
        return any(message.get("more_body") is False for message in messages)

    messages = leave(app, CHAT, {**ASK, "stream": True}, abort)
    body = b"".join(message.get("body", b"") for message in messages).decode()
    assert '"code":"service_unavailable"' in body.splitlines()[-2] and "[DONE]" not in body
    assert ended(engine)
