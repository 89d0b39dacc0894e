"""Server-sent events over HTTP: written as they come, and ended when their reader has gone or doesn't read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send


async def disconnected(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events, each already in its form (:func:`glm4serve.sse.event`)."""

    def __init__(self, events: AsyncGenerator[str, None], *, closed: Callable[[], None], ping: float) -> None:
        """closed: called once, however it ends. ping: seconds of silence, then a comment."""
        super().__init__(media_type="text/event-stream; charset=utf-8", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
        self._events, self._closed, self._ping = events, closed, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write them. Raises what ``send`` does."""
        gone = asyncio.ensure_future(disconnected(receive))
        pump = asyncio.ensure_future(self._pump(send))
        try:
            await asyncio.wait({gone, pump}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            gone.cancel()
            pump.cancel()
            await asyncio.wait({gone, pump})
            self._closed()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        coming: asyncio.Future[str] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({coming}, timeout=self._ping)
                if not done:
                    await send(_body(": waiting\n\n"))
                    continue
                try:
                    text = coming.result()
                except StopAsyncIteration:
                    break
                coming = None
                await send(_body(text))
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}
