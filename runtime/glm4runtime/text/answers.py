"""GLM-4's answers: tool calls, thoughts and words."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ToolCall", "parse_tool_calls", "read_call", "read_object_call", "split_answer", "split_thought"]


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called, and the JSON object it wants it called with."""

    name: str
    arguments: dict[str, Any]


_CALL = re.compile(r"\s*([\w.-]+)[ \t]*\n\s*(?=\{)")
_CALL_END = re.compile(r"\s*(<\|assistant\|>|\Z)")


def parse_tool_calls(text: str) -> list[ToolCall]:
    r"""Read an answer as tool calls: ``name\n{json}``, ``<|assistant|>`` between several, ``<|observation|>`` behind.

    A name is made of letters (of any script), digits, ``_``, ``.`` and ``-``. Whitespace around the parts is passed
    over. ``text`` is the answer decoded *with* its special tokens, from behind the prompt's ``<|assistant|>``; the last
    ``<|observation|>`` may be missing, as where generation stopped on it.

    Returns:
        The calls in their order, or [] if anything in ``text`` is not part of a call: then it's an answer in words.
        A stream of tokens knows more than text does, see :func:`split_answer`.
    """
    text = text.rstrip().removesuffix("<|observation|>").rstrip()
    calls: list[ToolCall] = []
    position = 0
    while True:
        head = _CALL.match(text, position)
        if head is None:
            return []
        try:
            # Read as JSON, not cut at the next marker: a marker may stand inside a string.
            arguments, position = _decoded(text, head.end())
        except (ValueError, RecursionError):
            return []
        end = _CALL_END.match(text, position)
        if end is None:
            return []
        calls.append(ToolCall(head[1], arguments))
        if not end[1]:
            return calls
        position = end.end()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    """1e999 is JSON, and infinity is none: the largest float stands for it."""
    number = float(digits)
    return math.copysign(sys.float_info.max, number) if math.isinf(number) else number


# Refuses the NaN and Infinity that Python's reader accepts
_JSON = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of half a character: with its other half it is one


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON value in ``text`` from ``start`` on, and where it ends; half a character is U+FFFD, as everywhere.

    By itself it can be in no text that is sent, nor in a prompt. Raises ValueError, RecursionError.
    """
    value, end = _JSON.raw_decode(text, start)
    if _HALF.search(text, start, end):
        written = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
        value = json.loads(written.decode("utf-16", "replace"))
    return value, end


def split_thought(text: str, opened: bool = False) -> tuple[str | None, str]:
    """Split an answer into what stands in ``<think>…</think>`` and what follows, both stripped of outer whitespace.

    The opening ``<think>`` may be missing, as where the prompt ended with it; then ``opened=True`` says so, and only
    matters while there is no ``</think>`` yet: all is thought. The first ``</think>`` ends the thought.

    Returns:
        (thought, answer); (None, text as it is) where there is no thought.
    """
    inside = text.lstrip()
    if inside.startswith("<think>"):
        inside, opened = inside[len("<think>") :], True
    thought, end, answer = inside.partition("</think>")
    if not end and not opened:
        return None, text
    return thought.strip(), answer.strip()


def split_answer(segments: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """Take an answer's words and its tool calls apart. ``segments``: its texts between ``<|assistant|>`` tokens.

    A segment is a call if it's one and nothing else, a thought in front of it apart; all others, broken calls among
    them, are words.

    Returns:
        The words (segments in their order, a newline between two), and the calls in their order.
    """
    words, calls = [], []
    for segment in segments:
        call = read_call(segment)
        if call is None:
            thought, end, rest = segment.partition("</think>")
            call = read_call(rest) if end else None
            if call is not None:
                segment = thought + end
            if segment.strip():
                words.append(segment)
        if call is not None:
            calls.append(call)
    return "\n".join(words), calls


def read_call(text: str) -> ToolCall | None:
    r"""The call that ``text`` is, ``name\n{json}`` and nothing else but whitespace around it; else None."""
    head = _CALL.match(text)
    if head is None:
        return None
    arguments = _object(text, head.end())
    return None if arguments is None else ToolCall(head[1], arguments)


def read_object_call(text: str) -> ToolCall | None:
    """The same of ``{"name": "search", "arguments": {"query": "…"}}``, as GLM-Z1-Rumination writes its calls."""
    call = _object(text, len(text) - len(text.lstrip()))
    if call is None or call.keys() != {"name", "arguments"}:
        return None
    name, arguments = call["name"], call["arguments"]
    return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _object(text: str, start: int) -> dict[str, Any] | None:
    """The JSON object that ``text`` is from ``start`` to its end."""
    try:
        value, end = _decoded(text, start)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None
