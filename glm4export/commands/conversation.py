"""A conversation's messages: what was said, taken back, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm4export.commands.text_lines import new_file
from glm4runtime.contract import UserError, shown

_ROLES = ("system", "user", "assistant")


class Conversation:
    """Messages as :meth:`glm4runtime.Session.chat` takes them; thoughts are none of them."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.set_system(system)

    def ask(self, question: str) -> None:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": question})

    def answered(self, answer: str) -> None:
        """Add what the assistant said; where that is nothing, take the question back."""
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.undo()

    def undo(self) -> bool:
        """Take the last question back, with its answer; whether there was one."""
        at = max((at for at, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if at is not None:
            del self.messages[at:]
        return at is not None

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def set_system(self, text: str | None) -> None:
        """Put another system message in front, or none."""
        rest = self.messages[1:] if self.messages and self.messages[0]["role"] == "system" else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises UserError where it can't be written, or holds something else."""
        if path.exists():
            try:
                _read(path)
            except UserError as error:
                raise UserError(f"{error}; it isn't replaced, name another") from None
        with new_file(path) as file:
            file.write(json.dumps(self.messages, ensure_ascii=False, indent=1).encode() + b"\n")

    def load(self, path: Path) -> None:
        """Take the messages of a file in place of these. Raises UserError where it holds none; these then stay."""
        self.messages = _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: exists and is not a regular file")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON, so no conversation") from None
    if not isinstance(found, list):
        raise UserError(f"{path}: no conversation: expected a list of messages, found {shown(found)}")
    for number, message in enumerate(found):
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or message["role"] not in _ROLES
            or not isinstance(message["content"], str)
        ):
            raise UserError(
                f"{path}: messages[{number}]: expected role ({', '.join(_ROLES)}) and content, found {shown(message)}"
            )
    return found
