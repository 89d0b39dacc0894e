"""Standard input, output and error, made fit for use: open, and able to take any text."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys

_ESCAPED = "glm4export.escaped"


def prepare() -> None:
    """Open what the caller closed, and escape what a stream's encoding lacks.

    A closed one is opened on the null device: else the next file to be opened, a bundle's perhaps, would be what
    others take for standard error, and Python prints errors to standard output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    sys.stderr = sys.stderr or _null("w")
    codecs.register_error(_ESCAPED, _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_ESCAPED)


def drop() -> None:
    """Discard buffered output, so that the interpreter's last flush doesn't fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())
        except ValueError:  # closed
            continue
    os.close(null)


def complain(message: str) -> None:
    """A line on standard error, or nowhere where that can't be written."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        drop()


def _null(mode: str) -> io.TextIOWrapper:
    stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123 (stays open as long as the process)
    assert isinstance(stream, io.TextIOWrapper)
    return stream


def _escape(error: UnicodeError) -> tuple[str, int]:
    """As JSON escapes it: what is printed as JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
