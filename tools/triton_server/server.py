"""The server: unpacked, given a virtual environment, started, stopped. It needs no GPU, and glibc 2.35."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "nvidia-pytriton==0.7.0"
RUNTIME = Path(__file__).resolve().parents[2] / "runtime"


@dataclass(frozen=True)
class Installed:
    """Where the server's parts are."""

    wheel: Path
    backends: Path
    environment: Path


def install(folder: Path, versions: list[str]) -> Installed:
    """Unpack the server into ``folder``, and make its Python an environment; what is there already is kept.

    The package's stubs read numpy's memory as numpy 1 lays it out. versions: further requirements, for pip.
    """
    parts = Installed(folder / "wheel", folder / "backends", folder / "environment")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not parts.backends.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(pip, check=True)
        (file,) = folder.glob("nvidia_pytriton-*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(parts.wheel)
        triton = parts.wheel / "pytriton" / "tritonserver"
        stub = "triton_python_backend_stub"
        shutil.copy(triton / "python_backend_stubs" / python / stub, triton / "backends" / "python" / stub)
        for program in (triton / "backends" / "python" / stub, triton / "bin" / "tritonserver"):
            program.chmod(0o755)
        parts.backends.symlink_to(triton / "backends", target_is_directory=True)
    if not parts.environment.is_dir():
        subprocess.run([sys.executable, "-m", "venv", str(parts.environment)], check=True)
        pip = [str(parts.environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "numpy<2", *versions]
        subprocess.run(pip, check=True)
    # The stub doesn't read PYTHONPATH.
    (site,) = (parts.environment / "lib").glob("python*/site-packages")
    (site / "glm4runtime.pth").write_text(f"{RUNTIME}\n")
    return parts


class Server:
    """One that runs: its ports on 127.0.0.1, its process and its log."""

    def __init__(self, parts: Installed, repository: Path, model: str, log: Path) -> None:
        self.http, self.grpc, self.metrics = _free_ports(3)
        self.log = log
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        command = [
            str(parts.wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={parts.backends}",
            "--model-control-mode=explicit",
            f"--load-model={model}",
            "--exit-timeout-secs=60",
            *(f"--{name}-port={port}" for name, port in ports.items()),
            *(f"--{name}-address=127.0.0.1" for name in ports),
        ]
        libraries = (sysconfig.get_config_var("LIBDIR"), parts.wheel / "nvidia_pytriton.libs")
        environment = os.environ | {
            "PATH": f"{parts.environment / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        }
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """HTTP's status and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http}{path}", timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait(self, seconds: float = 120) -> None:
        """Until it's ready. Raises RuntimeError with the log's end where it isn't."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.get("/v2/health/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server isn't ready; the end of {self.log}:\n{self.log.read_text()[-3000:]}")

    def number(self, name: str, *labels: str) -> float:
        """A metric's value, 0 where it isn't there."""
        for line in self.get("/metrics", self.metrics)[1].splitlines():
            if line.startswith(f"{name}{{") and all(label in line for label in labels):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


@contextmanager
def running(parts: Installed, repository: Path, model: str, log: Path) -> Iterator[Server]:
    """A server that is ready, ended with the block."""
    server = Server(parts, repository, model, log)
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(90)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
