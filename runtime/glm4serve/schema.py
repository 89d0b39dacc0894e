"""Bodies of requests: read once, strictly, and unknown fields refused. No framework: batches are read so too."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json

T = TypeVar("T")

#: A list of which the first wrong item is told, and no other: a million of them would take half a minute.
Items = Annotated[list[T], Field(fail_fast=True)]
_MOST_PARTS = 50_000  # objects, lists, and keys of objects in one body; ids and texts in lists don't count


class Strict(BaseModel):
    """A JSON object with these fields and no others; no value is converted into another type.

    A field that is null is as one that isn't there: many clients write that of all that they know and nobody has set.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict) or None not in given.values():
            return given
        return {key: value for key, value in given.items() if value is not None}


def read_json(data: bytes) -> Any:
    """What it holds. Unlike Python's reader, this one has a limit of depth (200), and refuses NaN and lone surrogates.

    Raises ValueError for what is no JSON, and for more parts than anybody asks in: each costs what a check of it does.
    """
    value = from_json(data, allow_inf_nan=False)
    left, found = _MOST_PARTS, [value]
    while found:
        part = found.pop()
        left -= 1
        if isinstance(part, dict):
            left -= len(part)
            found.extend(item for item in part.values() if isinstance(item, dict | list))
        elif isinstance(part, list):
            if len(part) > left and any(isinstance(item, dict | list) for item in part):
                left = -1
            else:
                found.extend(item for item in part if isinstance(item, dict | list))
        if left < 0:
            raise ValueError(f"more than {_MOST_PARTS} objects, lists and keys")
    return value
