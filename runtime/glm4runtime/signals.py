"""Signals that end a command: it undoes what it began and exits with 128 plus the signal's number.

Nothing is raised. An exception passes through whatever runs just then, and much of that (tracers that try one way after
another, imports of extensions) swallows it, makes another error of it, or prints it. Here the handler itself undoes and
leaves, so it doesn't matter what was under way. Standard library only, and little of it: it is imported first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

Undo = Callable[[], None]


class _State:  # no dataclass: that module takes as long to import as all the others here
    def __init__(self) -> None:
        self.undo: list[tuple[int, Undo]] = []  # each with the process that it belongs to
        self.held = 0
        self.pending: int | None = None
        self.raising = False


_state = _State()


@contextmanager
def handled() -> Iterator[None]:
    """While the block runs, SIGHUP, SIGINT and SIGTERM undo what is to be :func:`undone`, and end the process."""
    before = install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install() -> dict[int, Any]:
    """The same from now on; returns the handlers that were there.

    A signal that was ignored stays so: ``nohup`` asks for that, and so does a shell for its jobs in the background.
    Outside the main thread nothing is installed, since only there it can be.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in ENDING}
    return {
        number: signal.signal(number, _on_signal)
        for number, handler in found.items()
        if handler not in (signal.SIG_IGN, None, _on_signal)  # None: not one of Python's, and not to be put back
    }


@contextmanager
def raised() -> Iterator[None]:
    """While the block runs, signals raise KeyboardInterrupt or SystemExit: a conversation has a use for Ctrl-C."""
    _state.raising = True
    try:
        yield
    finally:
        _state.raising = False


@contextmanager
def undone(undo: Undo) -> Iterator[None]:
    """Call ``undo`` when a signal ends the process inside the block; the latest is called first."""
    entry = os.getpid(), undo
    _state.undo.append(entry)
    try:
        yield
    finally:
        _state.undo.remove(entry)


@contextmanager
def held() -> Iterator[None]:
    """A short block that no signal is to cut in two: one that arrives is acted upon at its end."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        if not _state.held and _state.pending is not None:
            number, _state.pending = _state.pending, None
            _act(number)


def leave(status: int) -> NoReturn:
    """End the process as it stands: without the half second that torch takes for its own end, unheeding of signals."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or None
            stream.flush()
    os._exit(status)


def _on_signal(number: int, _: object) -> None:
    if _state.held:
        _state.pending = number
    else:
        _act(number)


def _act(number: int) -> None:
    if _state.raising:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    for other in ENDING:  # a second Ctrl-C doesn't interrupt the cleaning up
        signal.signal(other, signal.SIG_IGN)
    for process, undo in reversed(_state.undo):
        if process == os.getpid():  # a fork has its parent's list
            with suppress(Exception):
                undo()
    said = "interrupted" if number == signal.SIGINT else f"glm4export: ended by {signal.Signals(number).name}"
    with suppress(OSError):  # the terminal may be what went away
        line = "\n" if os.isatty(2) else ""  # behind a progress bar
        os.write(2, f"{line}{said}\n".encode())
    leave(128 + number)
