"""API keys: who may ask, and as whom."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from glm4runtime.contract import UserError

_LEAST = 16  # characters


class Keys:
    """Keys and their owners' names. Keys themselves are not kept, only their sha256."""

    def __init__(self, owners: dict[str, str]) -> None:
        """owners: names by key. Raises UserError for a key that is too short to be one, and where there's none."""
        if not owners:
            raise UserError("API keys: none given; write one a line")
        for number, key in enumerate(owners, 1):
            if len(key) < _LEAST:
                raise UserError(
                    f"API keys: number {number} ({owners[key]}) has {len(key)} characters, expected at least {_LEAST}"
                )
        self._owners = [(_digest(key), owner) for key, owner in owners.items()]

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """Read ``KEY`` or ``NAME KEY`` lines; ``#`` begins a comment. Keys of one name take turns as one.

        Raises UserError where the file can't be read, or a line is neither. No message holds a key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: API keys can't be read: {error}") from error
        owners: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split("#", 1)[0].split()
            if len(words) > 2:
                raise UserError(f"{path}, line {number}: expected KEY or NAME KEY, found {len(words)} words")
            if words:
                if words[-1] in owners:
                    raise UserError(f"{path}, line {number}: this key is there twice")
                owners[words[-1]] = words[0] if len(words) == 2 else f"key{len(owners) + 1}"
        try:
            return cls(owners)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def owner(self, key: str) -> str | None:
        """Whose key it is; None where it's nobody's. Takes as long for every key of a length."""
        digest, found = _digest(key), None
        for known, owner in self._owners:
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
