"""A request under way, as its caller sees it: deltas to be read, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from types import TracebackType

from glm4runtime.contract import UserError
from glm4runtime.engine.request import Delta, Result, Timing, Usage

_BACKLOG = 32  # deltas that wait for a slow reader; from there on they are joined


class RequestFailed(UserError):
    """The engine could not answer: a graph failed, or gave no numbers. Other requests are not concerned.

    ``__cause__`` is what went wrong: a UserError where it's the request's or the bundle's.
    """


class Feed:
    """Deltas from the engine's thread to whoever reads; the engine holds this, the caller the Handle."""

    def __init__(self) -> None:
        self.cancelled = False
        self.timing = Timing()
        self.usage = Usage(0, 0, 0)
        self.result: Result | None = None
        self._condition = threading.Condition()
        self._deltas: deque[Delta] = deque()
        self._error: RequestFailed | None = None
        self._done = False
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def cancel(self) -> None:
        """Have the engine let go of it at its next step: there is one, as long as any request is under way.

        Takes no lock: the garbage collector calls this in whatever thread it likes, whatever lock that one holds.
        """
        self.cancelled = True

    def put(self, delta: Delta) -> None:
        """Hand over what is new."""
        with self._condition:
            if len(self._deltas) >= _BACKLOG:
                for at in range(len(self._deltas) - 1, -1, -1):
                    if self._deltas[at].choice == delta.choice:
                        self._deltas[at] = self._deltas[at].joined(delta)
                        return
            self._deltas.append(delta)
            self._wake()

    def end(self, result: Result | None, error: RequestFailed | None = None) -> None:
        """No more comes. Without effect where it has ended."""
        with self._condition:
            if not self._done:
                self._done, self._error, self.result = True, error, result
                self._wake()

    def _wake(self) -> None:
        self._condition.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_release, future)

    def take(self) -> Delta | None:
        """The next delta; None where there's no more. Raises what the request failed with."""
        with self._condition:
            while not self._deltas and not self._done:
                self._condition.wait()
            return self._next()

    async def take_async(self) -> Delta | None:
        """The same in an event loop."""
        while True:
            with self._condition:
                if self._deltas or self._done:
                    return self._next()
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                # Without those who gave up waiting
                self._waiters = [*((at, other) for at, other in self._waiters if not other.done()), (loop, future)]
            await future

    def _next(self) -> Delta | None:
        if self._deltas:
            return self._deltas.popleft()
        if self._error is not None:
            # A new one each time: its traceback holds the reader's Handle, whose finalizer holds this feed for good.
            raise RequestFailed(str(self._error)) from self._error.__cause__
        return None

    @property
    def done(self) -> bool:
        """Whether the engine has let go of the request."""
        return self._done

    def wait(self, timeout: float | None) -> bool:
        """Wait until it's done."""
        with self._condition:
            return self._condition.wait_for(lambda: self._done, timeout)


def _release(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Handle:
    """Iterate over it, or ``async for``, for the deltas; where several read, each delta goes to one of them.

    Where it is no longer referenced, its request is cancelled: a caller who went away takes no slot.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        weakref.finalize(self, feed.cancel).atexit = False

    def __iter__(self) -> Handle:
        return self

    def __next__(self) -> Delta:
        delta = self._feed.take()
        if delta is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> Delta:
        delta = await self._feed.take_async()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Stop: the slot is free within one step. From any thread; without effect on a request that has ended."""
        self._feed.cancel()

    @property
    def done(self) -> bool:
        """Whether the request has ended; its last deltas may still be unread."""
        return self._feed.done

    @property
    def timing(self) -> Timing:
        """When it started, gave its first token and finished."""
        return self._feed.timing

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self._feed.usage

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end and return all of it, whatever was read of it.

        Raises RequestFailed where it failed, TimeoutError after ``timeout`` seconds: the request then goes on.
        """
        if not self._feed.wait(timeout):
            raise TimeoutError(f"no whole answer after {timeout} seconds")
        return self._whole()

    async def result_async(self) -> Result:
        """The same in an event loop; it reads the deltas that are left."""
        async for _ in self:
            pass
        return self._whole()

    def _whole(self) -> Result:
        if self._feed.result is None:
            while self._feed.take() is not None:  # at its end it raises what went wrong
                pass
            raise RequestFailed("the engine was closed before the request was answered")
        return self._feed.result
