"""Read JSON from anywhere: typed access, and errors that name the key."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection
from typing import Any, TypeVar

from glm4runtime.contract.errors import BundleError

Name = TypeVar("Name", bound=str)

_REBUILD = "build the bundle again"
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 24
_BITS = 4096  # of a number that Python still writes out: its limit is 4300 digits, and the user may lower it


def shown(value: object) -> str:
    """A value of somebody's file as errors show it: its repr, cut where it's long or nested deep."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"an integer of {value.bit_length()} bits"
    return _REPR.repr(value)


def read_json(text: str, where: str, remedy: str = _REBUILD) -> FieldReader:
    """The object that a JSON text holds; ``where`` names it in errors. Raises BundleError."""
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error}); {remedy}") from None
    return FieldReader(data, where, remedy)


class FieldReader:
    """Typed access to a JSON object that names the key in its errors."""

    def __init__(self, data: Any, where: str, remedy: str = _REBUILD) -> None:
        self.where, self.remedy = where, remedy
        if not isinstance(data, dict):
            raise self.error(f"expected an object, found {type(data).__name__}")
        self.data: dict[str, Any] = data

    def error(self, message: str) -> BundleError:
        """An error about this object, with the remedy."""
        return BundleError(f"{self.where}: {message}; {self.remedy}")

    def __call__(self, key: str, kind: type) -> Any:
        if key not in self.data:
            raise self.error(f"key {key!r} is missing")
        value = self.data[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{_name(key)} is {shown(value)}, expected {kind.__name__}")
        return value

    def positive(self, key: str, least: int = 1) -> int:
        """An integer from ``least`` to 2**63 - 1."""
        value: int = self(key, int)
        if value < least:
            raise self.error(f"{_name(key)} is {shown(value)}, expected at least {least}")
        if value >= 1 << 63:
            raise self.error(f"{_name(key)} is {shown(value)}, expected less than 2**63")
        return value

    def text(self, key: str) -> str:
        """A text that may be printed."""
        value: str = self(key, str)
        if not value.isprintable():
            raise self.error(f"{_name(key)} is {shown(value)}, expected characters that can be printed")
        return value

    def matching(self, key: str, pattern: str, expected: str) -> str:
        """A text that the whole of ``pattern`` matches, which is ``expected`` in words."""
        value: str = self(key, str)
        if not re.fullmatch(pattern, value):
            raise self.error(f"{_name(key)} is {shown(value)}, expected {expected}")
        return value

    def one_of(self, key: str, known: Collection[Name]) -> Name:
        """A text that is one of ``known``."""
        value: Name = self(key, str)
        if value not in known:
            raise self.error(f"{_name(key)} {shown(value)} is not one of {', '.join(known)}")
        return value

    def items(self, key: str, *kinds: type) -> tuple[Any, ...]:
        values = self(key, list)
        for value in values:
            if type(value) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise self.error(f"{_name(key)} holds {shown(value)}, expected {expected}")
        return tuple(values)

    def optional(self, key: str, kind: type) -> Any:
        return None if self.data.get(key) is None else self(key, kind)

    def child(self, key: str) -> FieldReader:
        return FieldReader(self(key, dict), f"{self.where}: {_name(key)}", self.remedy)


def _name(key: str) -> str:
    """A key as errors name it: what a damaged file calls its keys doesn't reach a terminal as it is."""
    return key if key.isprintable() and len(key) <= 80 else shown(key)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two keys {shown(next(name for name in names if names.count(name) > 1))} in one object")
    return found
