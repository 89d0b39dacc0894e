"""Read a checkpoint's small files strictly, and refuse those that would exhaust memory or never end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm4runtime import contract
from glm4runtime.contract import shown

_MOST_BYTES = 1 << 24  # of a JSON file: the index of a model with a million tensors has less
_POINTER_BYTES = 64  # of a file, that tell a git-lfs pointer


def read_json(path: Path) -> Any:
    """The values of a JSON file in which no key is given twice.

    Raises FileNotFoundError; UserError for a git-lfs pointer; OSError, ValueError or RecursionError for the rest.
    """
    size = path.stat().st_size
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("not a regular file")
    if size > _MOST_BYTES:
        raise ValueError(f"{size} bytes; at most {_MOST_BYTES} are read")
    refuse_pointer(path)
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)


def refuse_pointer(path: Path) -> None:
    """Raise UserError where git-lfs's stand-in lies in a file's place, as a clone without git-lfs leaves it."""
    with path.open("rb") as file:
        contract.refuse_pointer(file.read(_POINTER_BYTES), str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON readers differ in which of two values they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shown(twice)} is given twice")
    return values
