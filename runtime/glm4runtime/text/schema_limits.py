"""How large a schema or regex may be, so that a stranger's can't keep llguidance busy for minutes: it can't be stopped.

Measured with llguidance 1.9.1 on one core: what is just within these limits takes up to three seconds, while
``(a{1000}){1000}``, 5000 properties in one object, or a ``multipleOf`` of ten millions take ten seconds to minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from glm4runtime.contract import UserError

MAX_SCHEMA_BYTES, MAX_DEPTH, MAX_GRAMMAR_BYTES = 256 * 1024, 64, 32 * 1024
MAX_PROPERTIES, MAX_ALL_PROPERTIES = 1000, 4000  # of one object; of all
MAX_MULTIPLE = 10_000  # sum over a schema; an automaton has a state for each remainder
MAX_REPETITION = 20_000  # characters of a regex with its counted repetitions written out; sum over a schema

_REGEX_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


class StructureError(UserError):
    """A structure that can't be enforced, or an answer that left it."""


def check_schema(schema: Any, what: str) -> int:
    """Returns the size in bytes. Raises StructureError for no JSON object, what passes a limit, and ``x-guidance``."""
    if not isinstance(schema, Mapping):
        raise StructureError(f"{what}: expected a JSON object, found {type(schema).__name__}")
    if "x-guidance" in schema:  # it could switch the enforcing off
        raise StructureError(f'{what}: the keyword "x-guidance" is not taken')
    objects = list(_objects(schema, what))
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StructureError(f"{what}: not JSON: {error}") from error
    _refuse(what, "bytes", size, MAX_SCHEMA_BYTES)
    groups = [item.get(key) for item in objects for key in ("properties", "required")]
    properties = [len(group) for group in groups if isinstance(group, Mapping | list | tuple)]
    _refuse(what, '"properties" or "required" of one object', max(properties, default=0), MAX_PROPERTIES)
    _refuse(what, '"properties" and "required" in all', sum(properties), MAX_ALL_PROPERTIES)
    _refuse(what, '"multipleOf" in all', sum(_states(item.get("multipleOf")) for item in objects), MAX_MULTIPLE)
    patterns = [item["pattern"] for item in objects if isinstance(item.get("pattern"), str)]
    for item in objects:
        keys = item.get("patternProperties")
        patterns += [key for key in keys if isinstance(key, str)] if isinstance(keys, Mapping) else []
    _refuse(what, '"pattern" with repetitions written out', sum(map(repetition, patterns)), MAX_REPETITION)
    return size


def check_regex(text: str, what: str) -> None:
    """Raises StructureError for one that passes a limit."""
    _refuse(what, "characters with repetitions written out", repetition(text), MAX_REPETITION)


def repetition(regex: str) -> int:
    """About how many characters a regex has with its counted repetitions written out."""
    groups = [0]  # sizes of the open groups so far
    last = 0  # size of what a count would repeat
    for part in _REGEX_PARTS.finditer(regex):
        if part[1] is not None:
            times = max(int(part[1][:9]), int((part[2] or "0")[:9]), 1)
            groups[-1] += last * (times - 1)
            last *= times
        elif part[0] == "(":
            groups.append(0)
            last = 0
        elif part[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif part[0] not in "*+?|":
            groups[-1] += 1
            last = 1
    return sum(groups)


def _objects(schema: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """All objects in a schema, level by level."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        yield from (value for value in level if isinstance(value, Mapping))
        inner = (item for value in level for item in (value.values() if isinstance(value, Mapping) else value))
        level = [item for item in inner if isinstance(item, Mapping | list | tuple)]
        _refuse(what, "objects and lists at one depth", len(level), MAX_SCHEMA_BYTES // 2)
        if not level:
            return
    raise StructureError(f"{what}: nested more than {MAX_DEPTH} deep")


def _states(multiple: Any) -> int:
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return 0
    digits = Decimal(str(multiple)).as_tuple().digits
    whole = min(abs(multiple), 10**12)
    return max(int(whole), int("".join(map(str, digits))[:12] or "0"))


def _refuse(what: str, kind: str, found: int, most: int) -> None:
    if found > most:
        raise StructureError(f"{what}: {kind}: at most {most} are taken, found {found}")
