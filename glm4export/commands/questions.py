"""What is typed in a conversation: lines, several of them together, and commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from glm4runtime.contract import UserError

_QUOTES = '"""'
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


def ask() -> str:
    r"""One input: a line, with those that follow a ``\`` at its end, or all up to the next three quotes.

    On a terminal its lines can be edited, and those before fetched with the arrow keys. Raises EOFError at the end,
    UserError where the input isn't text.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401, it changes what input() does
    return joined(lambda first: _line(("> " if first else ". ") if on_terminal else ""))


def joined(read: Callable[[bool], str]) -> str:
    """The same of lines that ``read`` gives; it is told whether the line is an input's first."""
    line = read(True)
    if line.startswith(_QUOTES):
        return _quoted(line.removeprefix(_QUOTES), read)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = read(False)
        except EOFError:
            return "\n".join(lines)
    return "\n".join([*lines, line])


def _quoted(line: str, read: Callable[[bool], str]) -> str:
    lines = []
    while _QUOTES not in line:
        lines.append(line)
        try:
            line = read(False)
        except EOFError:
            return "\n".join(lines).strip("\n")
    lines.append(line.partition(_QUOTES)[0])
    return "\n".join(lines).strip("\n")


def command_of(text: str) -> tuple[str, str] | None:
    """Name and argument of ``/name argument``; None for a question, as one is that begins with a space or a path."""
    found = _COMMAND.fullmatch(text.rstrip())
    return None if found is None else (found[1], found[2] or "")


def not_text(error: UnicodeDecodeError) -> UserError:
    """What is wrong with standard input."""
    return UserError(f"standard input: not valid {error.encoding} at byte {error.start} of what was read")


def _line(prompt: str) -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise not_text(error) from None
