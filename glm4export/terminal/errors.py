"""Show given values in errors: short, on one line, and without control codes that a terminal would obey."""

from __future__ import annotations

from glm4runtime.contract import UserError

MOST_LINES = 20  # of a list in an error; the rest is counted
_MOST_MESSAGE_LINES = 2 * MOST_LINES  # of a whole message, such as another package's
_MOST_CHARACTERS = 2000  # of a line


class InternalError(UserError):
    """A mistake of glm4export's own. No traceback: what was being compiled says more, so the message tells that."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}. This is a mistake in glm4export, not yours; please report it with this message")


def printable(text: str) -> str:
    """One line without control codes, which a terminal would obey, nor characters that reorder text."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} … and {len(text) - _MOST_CHARACTERS} characters more"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """The same, but line breaks stay: escape those inside a name before you call this."""
    return "\n".join(map(printable, text.split("\n")))


def message_text(message: str) -> str:
    """An error's message for a terminal: printable, and cut where it's long."""
    lines = message.split("\n")
    more = len(lines) - _MOST_MESSAGE_LINES
    cut = [f"… and {more} lines more"] if more > 0 else []
    return "\n".join([*map(printable, lines[:_MOST_MESSAGE_LINES]), *cut])


def listed(lines: list[str], total: int | None = None, most: int = MOST_LINES) -> str:
    """The first lines of a list, and how many more there are of ``total`` (default: of those given)."""
    shown_lines = lines[:most]
    more = (len(lines) if total is None else total) - len(shown_lines)
    return "\n  ".join([*map(printable, shown_lines), *([f"… and {more} more"] if more else [])])
