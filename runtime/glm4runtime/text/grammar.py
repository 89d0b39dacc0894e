"""What an answer must look like, checked, and written as llguidance's grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from glm4runtime.text.schema_limits import (
    MAX_GRAMMAR_BYTES,
    MAX_SCHEMA_BYTES,
    StructureError,
    check_regex,
    check_schema,
)
from glm4runtime.text.turn import ASSISTANT

__all__ = ["Structure", "StructureError", "called_functions", "grammar_of", "tool_structure"]


# Blanks without end would be valid JSON, and weak models write them; one behind , and : is what models are used to.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}
_LARK_REGEX = re.compile(r"/(?:\\.|[^/\\\n])+/")
_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Structure:
    """What an answer must look like: exactly one of these.

    Raises StructureError where that isn't given, or is too large.
    """

    json_schema: Mapping[str, Any] | None = None  # JSON Schema, draft 2020-12, of a document
    json_object: bool = False  # any JSON object
    regex: str | None = None  # of the whole answer, in the syntax of Rust's regex crate, without lookarounds
    lark: str | None = None  # llguidance's dialect of Lark
    tools: Sequence[Mapping[str, Any]] | None = None  # one or more calls of these, OpenAI-style descriptions
    function: str | None = None  # with tools: the only one to call
    parallel: bool = True  # with tools: whether several calls may be made

    def __post_init__(self) -> None:
        kinds = self._kinds
        if len(kinds) != 1:
            known = "json_schema, json_object, regex, lark, tools"
            raise StructureError(f"structure: expected one of {known}, found {', '.join(kinds) or 'none'}")
        if self.function is not None and self.tools is None:
            raise StructureError(f"structure: function={self.function!r} goes with tools")
        for name in ("regex", "lark"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise StructureError(f"{name}: expected text, found {text!r:.80}")
            if text is not None and len(text.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
                raise StructureError(f"{name}: {len(text)} characters; at most {MAX_GRAMMAR_BYTES} bytes are taken")
        for regex in [self.regex] if self.regex else _LARK_REGEX.findall(self.lark or ""):
            check_regex(regex, "regex" if self.regex else "lark")
        if self.json_schema is not None:
            check_schema(self.json_schema, "json_schema")
        if self.tools is not None:
            called_functions(self)

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return self._kinds[0]

    @property
    def _kinds(self) -> list[str]:
        return [f.name for f in fields(self)[:5] if getattr(self, f.name) not in (None, False)]


def tool_structure(tools: Sequence[Mapping[str, Any]], choice: Any, parallel: bool = True) -> Structure | None:
    """OpenAI's ``tool_choice`` as a structure; None where it leaves the model free (None, ``auto``, ``none``).

    choice: those, ``required``, or ``{"type": "function", "function": {"name": …}}``. parallel: OpenAI's
    ``parallel_tool_calls``. Raises StructureError for other choices and unknown functions.
    """
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return Structure(tools=tools, parallel=parallel)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise StructureError(
            'tool_choice: expected "auto", "none", "required" or {"type": "function", "function": {"name": …}}, '
            f"found {choice!r:.100}"
        )
    return Structure(tools=tools, function=name, parallel=False)


def called_functions(structure: Structure) -> dict[str, Mapping[str, Any]]:
    """Names and parameters' schemas of the functions that may be called. Raises StructureError."""
    found: dict[str, Mapping[str, Any]] = {}
    size = 0
    for i, tool in enumerate(structure.tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise StructureError(
                f"tools[{i}]: expected a function whose name is 1 to 64 letters, digits, _, . or -, found {tool!r:.100}"
            )
        if name in found:
            raise StructureError(f"tools[{i}]: {name!r} is there twice")
        parameters = function.get("parameters")
        where = f"tools[{i}] ({name}): parameters"
        size += check_schema({} if parameters is None else parameters, where)
        found[name] = {"type": "object", **(parameters or {})}
        if found[name]["type"] != "object":
            raise StructureError(f'{where}: expected "type": "object", found {found[name]["type"]!r:.80}')
    if not found:
        raise StructureError("tools: expected at least one function")
    if size > MAX_SCHEMA_BYTES:
        raise StructureError(f"tools: {size} bytes; at most {MAX_SCHEMA_BYTES} are taken")
    if structure.function is None:
        return found
    if structure.function not in found:
        raise StructureError(f"tools have no function {structure.function!r}; they are {', '.join(found)}")
    return {structure.function: found[structure.function]}


def grammar_of(structure: Structure) -> dict[str, Any] | str:
    """llguidance's grammar, as the JSON value of its own format; a regex as it is."""
    if structure.regex is not None:
        return structure.regex
    if structure.lark is not None:
        return {"grammars": [{"lark_grammar": structure.lark}]}
    if structure.tools is None:
        schema = {"type": "object"} if structure.json_schema is None else structure.json_schema
        return {"grammars": [{"json_schema": {**schema, "x-guidance": _JSON_STYLE}}]}
    functions = called_functions(structure)
    # A special token stands unquoted; quoted, it would be its letters.
    more = f' ({ASSISTANT} "\\n"? call)*' if structure.parallel else ""
    calls = " | ".join(f'{json.dumps(name)} "\\n" @f{i}' for i, name in enumerate(functions))
    grammars: list[dict[str, Any]] = [{"lark_grammar": f"start: call{more}\ncall: {calls}\n"}]
    for i, schema in enumerate(functions.values()):
        grammars.append({"name": f"f{i}", "json_schema": {**schema, "x-guidance": _JSON_STYLE}})
    return {"grammars": grammars}
