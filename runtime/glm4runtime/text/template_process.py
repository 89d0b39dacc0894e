"""A chat template in a process of its own, under limits of time and memory: :mod:`glm4runtime.text.template_worker`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import marshal
import os
import signal
import socket
import struct
import subprocess
import threading
import time
import weakref
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from glm4runtime.contract import UserError

#: CPU seconds that compiling, or one rendering, may take. GLM-4's own template takes a few tenths of a millisecond.
CPU_SECONDS = 5.0
#: The same on the clock, for a process that was stopped or gets no CPU.
CLOCK_SECONDS = 60.0
#: Bytes of address space of the process, about 30 MB of which are Python's and Jinja's own.
MEMORY = 512 * 2**20
#: Characters of one rendering: far more than any model's positions take.
LONGEST = 2**26

_WORKER = Path(__file__).resolve().with_name("template_worker.py")
_HEADER = struct.Struct("!cQ")  # as the worker has them
_LENGTH = struct.Struct("!Q")
_START = "each chat template is rendered in a Python process of its own, which "


class TemplateProcess:
    """Compiles one template and renders it, from any thread. The process is started at once and again when needed.

    It ends with this object. A forked process starts its own and leaves its parent's alone.
    """

    def __init__(self, source: str) -> None:
        """Raises UserError where the template doesn't compile, or the process can't be started."""
        self._source = source
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False
        _OPEN.add(self)
        with self._lock:
            #: Attributes, keys and strings that the template names.
            self.names = frozenset(json.loads(self._start()))

    def render(self, variables: dict[str, Any]) -> str:
        """The text. Variables are plain JSON values (tuples and keys of other types too).

        Raises UserError where the template fails, or passes a limit.
        """
        try:
            request = marshal.dumps(variables)
        except ValueError as error:
            raise UserError(f"chat template: messages, tools or variables nest without end: {error}") from error
        with self._lock:
            if self._closed:
                raise UserError("chat template: it was closed with its session; load the bundle again")
            if self._worker is None or not self._worker.alive():
                self._start()
            return self._ask(request)

    def close(self) -> None:
        """End the process, once it has given the answer it's at. From then on :meth:`render` raises UserError."""
        with self._lock:
            self._closed = True
            self._close()

    def _start(self) -> str:
        self._close()
        self._worker = _Worker()
        self._end = weakref.finalize(self, self._worker.close)  # at exit too
        try:
            return self._ask(marshal.dumps(self._source))
        except BaseException:
            self._close()
            raise

    def _ask(self, request: bytes) -> str:
        assert self._worker is not None
        try:
            return self._worker.ask(request)
        except BaseException as error:  # a KeyboardInterrupt too: what comes next on the socket is no answer any more
            if not isinstance(error, TemplateError):
                self._close()
            raise

    def _close(self) -> None:
        if self._worker is not None:
            self._end()
            self._worker = None

    def _forked(self) -> None:
        """In a child: the socket is the parent's, and a thread that isn't here may have held the lock."""
        self._lock = threading.Lock()
        self._close()


class TemplateError(UserError):
    """The template's own failure; the process goes on."""


class _Worker:
    """The process and the socket to it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._socket, theirs = socket.socketpair()
        packages = {_folder_of(name) for name in ("jinja2", "markupsafe")}
        command = [_python(), "-I", "-S", "-B", str(_WORKER), str(CPU_SECONDS), str(MEMORY), str(LONGEST)]
        # TZ for strftime_now, LD_LIBRARY_PATH for Pythons whose library lies elsewhere; nothing else is its business.
        environment = {name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ}
        try:
            self._process = subprocess.Popen(
                [*command, *sorted(packages)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._socket.close()
            raise UserError(f"{_START}couldn't be started: {error}") from error
        finally:
            theirs.close()

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes) -> str:
        """Send one request and wait for its answer. Raises TemplateError, or UserError where the process has ended."""
        end = time.monotonic() + CLOCK_SECONDS
        try:
            self._socket.settimeout(CLOCK_SECONDS)
            self._socket.sendall(_LENGTH.pack(len(request)) + request)
            kind, length = _HEADER.unpack(self._receive(_HEADER.size, end))
            if length > 4 * LONGEST:
                raise EOFError
            answer = self._receive(length, end).decode("utf-8", "surrogatepass")
        except TimeoutError:
            raise UserError(_limit(f"no answer in {CLOCK_SECONDS:g} seconds")) from None
        except (OSError, EOFError, UnicodeDecodeError):
            raise UserError(self._ended()) from None
        if kind == b"m":
            raise UserError(
                _limit(
                    f"it needs more than {MEMORY >> 20} MB of memory, or writes over {LONGEST >> 20} million characters"
                )
            )
        if kind != b"k":
            raise TemplateError(f"chat template{answer}")
        return answer

    def _receive(self, count: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(end - time.monotonic(), 1e-3))
            got = self._socket.recv(min(count - len(data), 1 << 20))
            if not got:
                raise EOFError
            data += got
        return bytes(data)

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        status = self._process.returncode
        if status == -signal.SIGPROF:
            return _limit(f"it takes more than {CPU_SECONDS:g} seconds")
        if status is not None and status < 0:
            return _limit(f"its process was ended by signal {-status} ({signal.strsignal(-status)})")
        return (
            f"{_START}ended with status {status}: {_python()} has to be a Python that starts; "
            "where Python is embedded, multiprocessing.set_executable names one"
        )

    def close(self) -> None:
        """Let go of the process, which ends as its socket closes. Only the process that started it waits for that."""
        self._socket.close()
        if self._pid == os.getpid():
            self._process.kill()
            self._process.wait()
        else:
            self._process.returncode = 0  # not ours to wait for


def _limit(what: str) -> str:
    return f"chat template: stopped, {what}; give a template that ends (chat_template=, --chat-template)"


def _python() -> str:
    return os.fsdecode(spawn.get_executable() or "python3")


def _folder_of(package: str) -> str:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"{_START}found no package {package}")
    return str(Path(found.origin).resolve().parent.parent)


_OPEN: weakref.WeakSet[TemplateProcess] = weakref.WeakSet()


def _after_fork() -> None:
    for template in list(_OPEN):
        template._forked()


os.register_at_fork(after_in_child=_after_fork)
