"""Requests to an ASGI application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


def ask(app: Any, path: str, body: Any = None, *, method: str | None = None, **options: Any) -> httpx.Response:
    """One request; a body that is bytes is sent as it is, others as JSON."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            if isinstance(body, bytes):
                options["content"] = body
            elif body is not None:
                options["json"] = body
            return await client.request(method or ("GET" if body is None else "POST"), path, **options)

    return asyncio.run(send())


def events(response: httpx.Response) -> list[Any]:
    """Data of a stream's events, read as JSON but for ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def leave(app: Any, path: str, body: Any, when: Callable[[list[Any]], Awaitable[bool]], send: Any = None) -> list[Any]:
    """A client that goes away as soon as ``when(messages so far)``; returns what it was sent.

    send: called with each message in place of taking it.
    """
    messages: list[Any] = []
    data = json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def run() -> None:
        sent = False

        async def receive() -> Any:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": data, "more_body": False}
            while not await when(messages):
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def take(message: Any) -> None:
            messages.append(message)
            if send is not None:
                await send(message)

        await asyncio.wait_for(app(scope, receive, take), 20)

    asyncio.run(run())
    return messages
