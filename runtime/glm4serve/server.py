"""The application under uvicorn: a socket, TLS, and an end that leaves nobody without an answer."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from glm4runtime import signals
from glm4runtime.contract import UserError
from glm4serve import logs
from glm4serve.service import Service

_KEEP_ALIVE = 75  # seconds; clients give up idle connections after 5 or 60, and have to be the first
_LOOK = 0.5  # seconds between two looks at whether engines live
_CUT = 5.0  # seconds that answers have to tell their clients that the server ends them
#: uvicorn's options for every server of ours. httptools, which it takes where that is installed, has no limit of
#: headers, and chunks for HTTP/1.0.
HTTP: dict[str, Any] = {"http": "h11", "ws": "none", "log_config": None, "access_log": False, "server_header": False}


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at the address, which doesn't listen yet; port 0: a free one. Raises UserError where it can't be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(f"{host}, port {port}: can't be listened on: {error}; choose another with --port") from error
    return bound


def drop_unread(bound: socket.socket, seconds: float) -> None:
    """Have the system end connections whose client leaves what was sent unread for so long, where it can (Linux).

    An answer given in whole is in a buffer of ours by then, and closing a connection waits for that to be read.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1000 * seconds)))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_certificate(certificate: Path, key: Path | None) -> None:
    """Raises UserError where TLS can't be made of them."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        raise UserError(f"{certificate}: no certificate and key that TLS can use: {error}") from error


def serve(
    app: FastAPI,
    bound: socket.socket,
    *,
    drain: float,
    certificate: Path | None = None,
    key: Path | None = None,
    ready: Callable[[str], None],
) -> int:
    """Run the application until a signal ends it; returns the process's exit status. ready: told the address, once it
    answers.

    SIGINT, SIGTERM or SIGHUP: no more requests are taken (503), those under way have ``drain`` seconds, and are then
    ended with an error. A second signal ends the process at once. Where an engine's thread dies it ends in the same way
    by itself, with status 1: whoever started it can start it again.
    """
    service: Service = app.state.service
    # Connections have what their listener has. It is behind the service's own cut, which the log tells of and which
    # begins later, too: once a stream has filled the buffers.
    drop_unread(bound, 2 * service.settings.write_timeout)
    config = uvicorn.Config(
        app,
        **HTTP,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(_CUT),
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = _Server(config, service, bound, drain, ready)
    server.run(sockets=[bound])
    return server.status


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        bound: socket.socket,
        drain: float,
        ready: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._service, self._bound, self._seconds, self._ready = service, bound, drain, ready
        self._ending: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            gc.collect()
            gc.freeze()  # so that the collector's passes look at requests alone: sooner done, and made more often
            self._watching = asyncio.ensure_future(self._watch())
            host, port = self._bound.getsockname()[:2]
            scheme = "https" if self.config.ssl_certfile else "http"
            self._ready(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which closes the door before those inside are done."""
        loop, before = asyncio.get_running_loop(), {}
        for number in signals.ENDING:
            before[number] = signal.getsignal(number)
            if before[number] is not signal.SIG_IGN:  # nohup asks for that
                loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _on_signal(self, number: int) -> None:
        if self._ending is not None:
            logs.event("ended", by=signal.Signals(number).name, in_flight=self._service.in_flight)
            signals.leave(128 + number)
        self._ending = asyncio.ensure_future(self._end(signal.Signals(number).name))

    async def _watch(self) -> None:
        """End the server once an engine's thread has died."""
        while self._ending is None:
            for generator in self._service.models.bundles:
                death = generator.engine.stats().death
                if death is not None:
                    logs.event("engine died", model=generator.name, reason=death)
                    self.status = 1
                    self._ending = asyncio.ensure_future(self._end("death"))
            await asyncio.sleep(_LOOK)

    async def _end(self, by: str) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        service.draining = True
        logs.event("draining", by=by, in_flight=service.in_flight, seconds=self._seconds)
        await self._idle(loop.time() + self._seconds)
        cut = service.in_flight
        service.abort()
        await self._idle(loop.time() + _CUT)
        logs.event("ended", by=by, cut=cut)
        self.should_exit = True

    async def _idle(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        while self._service.in_flight and loop.time() < until:
            await asyncio.sleep(0.02)
