"""Convert messages to the form that a chat template reads, and check that the template leaves none out.

Callers write tool turns as OpenAI does: ``tool_calls`` on the assistant's message, results in the role ``tool``. The
templates of GLM-4-0414 read a call as ``metadata``, the function's name, beside the arguments as ``content``, and
results in the role ``observation``; what they don't read isn't in the prompt. So turns are rewritten where a template
names only the latter, and a message that isn't seen all the same is refused. GLM-Z1-Rumination's template has its own
tools written out in it, and its calls are ``{"name": …, "arguments": …}`` in the content.

Old thoughts are none of the prompt's: GLM-Z1's templates cut them, for others they are taken out here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glm4runtime.contract import UserError
from glm4runtime.text.answers import split_thought
from glm4runtime.text.turn import THINK_END

Message = dict[str, Any]
Show = Callable[[Sequence[Message]], str]  # renders messages

#: Keys that tell turns apart or are dropped from old turns by design; every other one is for the model to see.
_NOT_SHOWN = frozenset({"role", "name", "id", "tool_call_id", "reasoning_content", "reasoning", "thinking"})


@dataclass(frozen=True)
class Turn:
    """A message as the template gets it, and the index of the caller's that it's made from."""

    message: Message
    origin: int


def in_template_s_form(
    messages: Sequence[Message], names: frozenset[str], show: Show, own_tools: bool = False
) -> list[Turn]:
    """Rewrite what a template that names ``names`` wouldn't read. ``messages`` are plain copies.

    own_tools: the template has its tools written out in it, as GLM-Z1-Rumination's.

    Raises UserError where a tool call isn't one.
    """
    turns: list[Turn] = []
    reads_strings: bool | None = None
    for i in range(len(messages)) if "tool_call_id" in names else _by_call(messages):
        message = messages[i] if "text" in names else _joined(messages[i])
        if message.get("content") == []:  # no parts; templates would write the brackets
            message = {**message, "content": ""}
        if message["role"] == "developer" and "developer" not in names:  # OpenAI's later word for it
            message = {**message, "role": "system"}
        if message["role"] == "assistant" and THINK_END not in names:
            message = _without_thought(message)
        if message["role"] == "assistant" and message.get("tool_calls"):
            calls = _checked(message["tool_calls"], f'messages[{i}]["tool_calls"]')
            if "tool_calls" not in names and "metadata" in names:
                as_own = _as_content if own_tools else _as_metadata
                turns += [Turn(part, i) for part in as_own(message, calls)]
                continue
            if any(isinstance(arguments, str) for _, arguments in calls):
                reads_strings = _reads_strings(show) if reads_strings is None else reads_strings
                if not reads_strings:
                    message = {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        elif message["role"] == "tool" and "tool" not in names and "observation" in names:
            message = {**message, "role": "observation"}
        turns.append(Turn(message, i))
    return turns


def _by_call(messages: Sequence[Message]) -> list[int]:
    """Indices of the messages, the results of several calls in the order of the calls: templates don't match ids."""
    order = list(range(len(messages)))
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if message["role"] != "assistant" or not isinstance(calls, list):
            continue
        ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
        place = {identity: number for number, identity in enumerate(ids) if isinstance(identity, str)}
        end = next((j for j in range(i + 1, len(messages)) if messages[j]["role"] != "tool"), len(messages))
        results = order[i + 1 : end]
        order[i + 1 : end] = sorted(results, key=lambda j: place.get(str(messages[j].get("tool_call_id")), len(ids)))
    return order


def _joined(message: Message) -> Message:
    """Content in parts as one string, for a template that takes strings only; as it is where a part isn't text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        return message
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _checked(calls: Any, where: str) -> list[tuple[str, Any]]:
    """Names and arguments of tool calls. Raises UserError where that isn't what they hold."""
    if not isinstance(calls, list):
        raise UserError(f"{where}: expected a list, found {type(calls).__name__}")
    found = []
    for i, call in enumerate(calls):
        function = _function(call)
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            raise UserError(
                f'{where}[{i}]: expected {{"function": {{"name": …, "arguments": …}}}}, found {call!r:.200}'
            )
        if isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise UserError(f"{where}[{i}]: arguments: expected a JSON object, found {arguments!r:.200}")
        elif not isinstance(arguments, dict):
            raise UserError(f"{where}[{i}]: arguments: expected a JSON object or its text, found {arguments!r:.200}")
        found.append((name, arguments))
    return found


def _function(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _as_metadata(message: Message, calls: Sequence[tuple[str, Any]]) -> Iterator[Message]:
    """One message for each call as GLM-4-0414 reads it, behind one with the words."""
    others = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    if not _is_empty(message.get("content")):
        yield {**others, "content": message["content"]}
    for name, arguments in calls:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        yield {"role": "assistant", "metadata": name, "content": text}


def _as_content(message: Message, calls: Sequence[tuple[str, Any]]) -> Iterator[Message]:
    """The same as GLM-Z1-Rumination writes them: the message's content is the call."""
    others = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    if not _is_empty(message.get("content")):
        yield {**others, "content": message["content"]}
    for name, arguments in calls:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        yield {"role": "assistant", "content": json.dumps({"name": name, "arguments": value}, ensure_ascii=False)}


def _without_thought(message: Message) -> Message:
    """Without the thought in its content, for a template that would show it."""
    content = message.get("content")
    if isinstance(content, str) and THINK_END in content:
        return {**message, "content": split_thought(content)[1]}
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        last = max((i for i, text in enumerate(texts) if isinstance(text, str) and THINK_END in text), default=None)
        if last is not None:
            kept = {**content[last], "text": str(texts[last]).partition(THINK_END)[2].strip()}
            return {**message, "content": [kept, *content[last + 1 :]]}
    return message


def _with_object(call: Any) -> Any:
    """The call with its arguments as an object; the form of the call, which was checked, stays."""
    function = _function(call)
    if isinstance(function["arguments"], str):
        function = {**function, "arguments": json.loads(function["arguments"])}
    return {**call, "function": function} if "function" in call else function


def _reads_strings(show: Show) -> bool:
    """Whether the template writes arguments given as text as they stand, not as a JSON string with escaped quotes."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"key": "value"}'}}
    asked = {"role": "user", "content": "a"}
    try:
        return '{"key": "value"}' in show([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except UserError:
        return False


def check_all_shown(turns: Sequence[Turn], text: str, show: Show) -> None:
    """Refuse messages that ``text``, their prompt, doesn't hold.

    Content, calls and whatever else a message has are replaced by markers, and the markers looked for in one more
    rendering. What isn't there is changed on its own, or taken out where it's no text, and if the prompt stays the
    same, the model would never have seen it. So templates may strip, cut old thoughts, or read a key that is no text.
    """
    messages = [turn.message for turn in turns]
    marked = copy.deepcopy(messages)
    parts = [(i, path) for i, message in enumerate(messages) for path in _parts(message)]
    markers = [_mark(marked[i], path, f"shown{number}here") for number, (i, path) in enumerate(parts)]
    try:
        shown = show(marked) if parts else ""
    except UserError:  # a template that reads what it is given closely; then each part has to show that it matters
        shown = ""
    for (i, path), wanted in zip(parts, markers, strict=True):
        if wanted and all(marker in shown for marker in wanted):
            continue
        other = copy.deepcopy(messages)
        if not _mark(other[i], path, "other"):
            _take_out(other[i], path)
        try:
            matters = show(other) != text
        except UserError:
            matters = True
        if not matters:
            where = "".join(f"[{step!r}]" for step in path)
            raise UserError(
                f"messages[{turns[i].origin}] (role {messages[i]['role']!r}): the chat template leaves {where} out, "
                "so the model would never see it; write it in a form that the template reads, or give another template"
            )


Path = tuple[Any, ...]


def _parts(message: Message) -> Iterator[Path]:
    """Where a message holds something for the model to see."""
    for key, value in message.items():
        if key in _NOT_SHOWN or _is_empty(value):
            continue
        if key in ("content", "tool_calls") and isinstance(value, list):
            yield from ((key, i) for i in range(len(value)))
        else:
            yield (key,)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, ()) or (isinstance(value, str) and not value.strip())


def _mark(message: Message, path: Path, marker: str) -> list[str]:
    """Put a marker in place of a part; returns what then has to be seen, nothing where it can't be marked."""
    holder: Any = message
    for step in path[:-1]:
        holder = holder[step]
    value = holder[path[-1]]
    if isinstance(value, str):
        holder[path[-1]] = marker
        return [marker]
    if path[0] == "content" and isinstance(value, dict) and isinstance(value.get("text"), str):
        value["text"] = marker
        return [marker]
    if path[0] == "tool_calls" and (function := _function(value)):
        argument = {f"{marker}key": "a"}
        function["name"] = f"{marker}name"
        function["arguments"] = json.dumps(argument) if isinstance(function.get("arguments"), str) else argument
        return [f"{marker}name", f"{marker}key"]
    return []


def _take_out(message: Message, path: Path) -> None:
    holder: Any = message
    for step in path[:-1]:
        holder = holder[step]
    del holder[path[-1]]
