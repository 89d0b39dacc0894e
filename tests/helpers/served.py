"""``glm4export serve`` as a process, and what its metrics tell of it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.helpers.processes import GLM4EXPORT

KEY = "a-key-of-some-length"


@contextmanager
def served(bundle: Path, folder: Path) -> Iterator[str]:
    """The address of a server of the bundle under the name demo, which takes :data:`KEY`. folder: for files of ours."""
    keys = folder / "keys"
    keys.write_text(f"tests {KEY}\n")
    options = ["--name", f"demo={bundle}", "--port", "0", "--json", "--keys", keys]
    options += ["--threads", "1", "--slots", "4", "--max-seq-len", "512", "--max-queue", "8"]
    command = [*GLM4EXPORT, "serve", *map(str, options)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    told = json.loads(server.stdout.readline())
    assert told["models"] == ["demo"]
    yield told["url"]
    server.terminate()
    assert server.wait(20) == 0


#: Requests whose clients left.
CANCELLED = 'glm4:request_success_total{finished_reason="cancelled"'


def metric(url: str, start: str) -> float:
    """The sum of the samples whose name and labels begin so."""
    lines = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(start))


def free(url: str) -> bool:
    """Whether nothing runs or waits, after a while."""
    deadline = time.monotonic() + 60
    while metric(url, "glm4:num_requests_") and time.monotonic() < deadline:
        time.sleep(0.02)
    return metric(url, "glm4:num_requests_") == 0
