"""A client that sees every chunk as it comes, and can leave anywhere: HTTP/1.1 on a socket, as far as ours needs it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}


def body_of(kind: str, text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """A request in a protocol's form."""
    if kind == "completions":
        return {"prompt": text, "max_tokens": tokens, **fields}
    if kind == "responses":
        return {"input": text, "max_output_tokens": tokens, **fields}
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, **fields}


class Exchange:
    """One request on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, host: str, port: int, *, receive_buffer: int | None = None) -> Exchange:
        """Connect. receive_buffer: bytes that the kernel takes for a client that doesn't read."""
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
        return cls(*await asyncio.open_connection(sock=connection, limit=receive_buffer or 1 << 20))

    def send(self, path: str, body: Any, id: str, *, whole: bool = True) -> None:
        """Write a request; without ``whole`` half of its body."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-Id: {id}\r\n"
        self._writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        self._writer.write(data if whole else data[: len(data) // 2])

    async def head(self) -> None:
        """Read status and headers. Raises EOFError where the server closes first."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises EOFError where it is cut off."""
        if self.headers.get("transfer-encoding") != "chunked":
            yield await self._reader.readexactly(int(self.headers.get("content-length", 0)))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([chunk async for chunk in self.chunks()])

    def leave(self, *, reset: bool) -> None:
        """Close the connection, whatever is under way; reset: without a farewell."""
        if reset:
            self._writer.transport.abort()
        else:
            self._writer.close()


async def ask(host: str, port: int, path: str, body: Any, id: str) -> tuple[int, bytes]:
    """Status and body of one request. Raises OSError or EOFError where the connection breaks."""
    exchange = await Exchange.open(host, port)
    try:
        exchange.send(path, body, id)
        await exchange.head()
        return exchange.status, await exchange.body()
    finally:
        exchange.leave(reset=False)


def told_of(status: int, body: bytes) -> str:
    """How a request ended, as its client sees it: ``whole``, an error's code, or ``cut`` where nobody said so."""
    text = body.decode("utf-8", "replace")
    if status != 200:
        return f"{status}" if '"error"' in text else "cut"
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events:
        return "whole" if text.endswith("}") else "cut"
    last = events[-1]
    if (
        last == "[DONE]"
        or '"message_stop"' in last
        or '"response.completed"' in last
        or '"response.incomplete"' in last
    ):
        return "whole"
    return "told" if '"error"' in last else "cut"
