"""The service under Ray as a process: started, looked into, ended; and the table of what was found."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SLOTS = 4
FINDINGS: list[str] = []


def row(what: str, found: str, well: bool) -> None:
    """A line of the table."""
    print(f"{what:<34} {found:<76} {'ok' if well else 'FINDING'}", flush=True)
    if not well:
        FINDINGS.append(what)


class Served:
    """``glm4export serve --ray`` in a process."""

    def __init__(self, bundle: Path, *options: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        argv = [sys.executable, "-m", "glm4export", "serve", "--name", f"demo={bundle}", "--ray", "--json"]
        argv += ["--threads", "1", "--slots", str(SLOTS), "--max-queue", "64", "--port", str(port), *options]
        self.log = Path(tempfile.mkdtemp(prefix="ray-check-")) / "log"
        began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.url = json.loads(line)["url"]
                break
        else:
            raise SystemExit(f"it didn't start; its log is {self.log}")
        self.seconds = time.monotonic() - began

    def replicas(self) -> list[int]:
        """Process ids."""
        return [pid for pid, title in self._below() if title.startswith("ray::ServeReplica:glm4:replica")]

    def _below(self) -> Iterator[tuple[int, str]]:
        parents, titles = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        for pid in parents:
            above = pid
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and pid != above:
                yield pid, titles.get(pid, "")

    def logged(self, text: str) -> int:
        """How often it is in the log."""
        return self.log.read_text(errors="replace").count(text)

    def end(self) -> None:
        """SIGTERM, and what is left after it."""
        left = [pid for pid, _ in self._below()]
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        seconds = time.monotonic() - began
        time.sleep(1)
        alive = [pid for pid in left if Path(f"/proc/{pid}").exists() and _running(pid)]
        row(
            "SIGTERM", f"exit status {status} after {seconds:.1f} s; {len(alive)} processes left", not (status or alive)
        )


def _running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
