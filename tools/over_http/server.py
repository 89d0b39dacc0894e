"""``glm4export serve`` as a process: its address, its log, its metrics, its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

NAME = "m"  # of the model


class Server:
    """One that answers, until it is ended."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "glm4export", "serve", "--name", f"{NAME}={bundle}", "--port", "0", "--json"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the server didn't start: {self.process.communicate()[1]}")
        self.url: str = json.loads(line)["url"]
        self.host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self.log: list[dict[str, Any]] = []
        self.other: list[str] = []  # lines on standard error that are no log: there should be none
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.other.append(line.rstrip())

    def requests(self) -> dict[str, dict[str, Any]]:
        """Lines of the log of requests, by their ids."""
        return {line["id"]: line for line in list(self.log) if line["event"] == "request"}

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"glm4:{name}"))

    def healthy(self) -> bool:
        """Whether /health says so; it raises nothing."""
        try:
            with urlopen(f"{self.url}/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def idle(self, seconds: float) -> bool:
        """Whether within so many seconds nothing runs or waits."""
        end = time.monotonic() + seconds
        while (left := self.metric("num_requests_")) and time.monotonic() < end:
            time.sleep(0.05)
        return not left

    def memory(self) -> tuple[int, int]:
        """Bytes in memory: its own, and those of mapped files.

        Weights are mapped: a page of them comes when it's first read, such as a token's row of the embeddings, and the
        system takes it back where it needs room. So of the two only the first can leak.
        """
        lines = (line.split() for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0].startswith("Rss")}
        return sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"]

    def wait(self, seconds: float) -> int | None:
        """Its exit status, and all of its log; None where it goes on."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(seconds)
        return status


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """A server, which is ended with the block."""
    server = Server(bundle, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            if server.wait(20) is None:
                server.process.kill()
                server.process.wait()
