"""Signals: who is under way is answered or told."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from glm4runtime.contract import UserError
from glm4serve import Settings, create_app
from glm4serve.server import bound_socket, check_certificate, drop_unread, is_loopback, serve
from tests.helpers.asgi import ASK, CHAT
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def start() -> Iterator[Any]:
    """Start a server over a fake engine; returns the process and its address."""
    running = []

    def run(pause: float, drain: float) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "tests.helpers.fake_server", str(pause), str(drain)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        running.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield run
    for process in running:
        process.kill()
        process.wait()


class Reader(threading.Thread):
    """Reads a stream to its end; ``error`` is what it ended with."""

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__()
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.pieces: list[str] = []
        self.error: Exception | None = None
        self.reason: str | None = None
        self.tokens = tokens
        self.start()
        while not self.pieces:
            time.sleep(0.01)

    def run(self) -> None:
        try:
            for chunk in self.client.chat.completions.create(
                model="m", messages=ASK["messages"], stream=True, max_tokens=self.tokens
            ):
                self.pieces.append(chunk.choices[0].delta.content or "")
                self.reason = chunk.choices[0].finish_reason
        except Exception as error:
            self.error = error


def test_a_signal_lets_answers_end(start: Any) -> None:
    """A short one whole; a long one is told; meanwhile new ones are refused, and the process lives until then."""
    process, url = start(0.02, 4)
    short, long = Reader(url, 30), Reader(url, 1000)
    with httpx.Client(base_url=url) as client:
        process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            time.sleep(0.01)
        assert client.get("/ready").json() == {"status": "draining"}
        refused = client.post(CHAT, json=ASK)
        assert refused.status_code == 503 and refused.headers["retry-after"]
    short.join()
    assert short.error is None and short.reason == "stop" and short.pieces.count("a ") == 30
    assert process.poll() is None
    long.join()
    assert isinstance(long.error, openai.APIError) and "shut down" in str(long.error)
    assert process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(start: Any) -> None:
    process, url = start(0.02, 60)
    reader = Reader(url, 1000)
    process.send_signal(signal.SIGTERM)
    while httpx.get(f"{url}/ready").status_code == 200:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT
    reader.join()
    assert reader.error is not None


def test_a_port_that_is_taken() -> None:
    with bound_socket("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1, port {port}: can't be listened on: .*--port"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(UserError, match="port 70000: can't be listened on"):
        bound_socket("127.0.0.1", 70000)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's")
def test_connections_that_nobody_reads_are_ended_by_the_system() -> None:
    """An answer in whole is in the transport's buffer at once, where no timeout of ours sees that it stays there."""
    with bound_socket("127.0.0.1", 0) as bound:
        drop_unread(bound, 1.5)
        bound.listen()
        with socket.create_connection(bound.getsockname()):
            accepted, _ = bound.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


def test_a_server_has_its_connections_ended() -> None:
    started: list[int] = []
    with bound_socket("127.0.0.1", 0) as bound, pytest.raises(RuntimeError, match="enough"):

        def ready(address: str) -> None:
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                started.append(bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
            raise RuntimeError("enough")

        app = create_app({"m": FakeEngine()}, Settings(write_timeout=2.0))  # type: ignore[dict-item]
        serve(app, bound, drain=0.0, ready=ready)
    assert started in ([4000], [])  # behind the service's own cut, which says so in the log


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("none")
    with pytest.raises(UserError, match=r"cert\.pem: no certificate and key that TLS can use"):
        check_certificate(tmp_path / "cert.pem", None)


def test_which_addresses_only_this_machine_reaches() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "machine")] == [False] * 4
