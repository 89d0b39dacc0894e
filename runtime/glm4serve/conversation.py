"""A conversation put together of single items: for protocols in which calls and their results are no messages."""

from __future__ import annotations

from typing import Any

from glm4serve.errors import ApiError


class Conversation:
    """Messages as the chat template takes them, see :meth:`glm4runtime.Session.chat`."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._order: dict[str, int] = {}  # of calls, by their ids

    def say(self, role: str, text: str) -> None:
        """A message of words."""
        self.messages.append({"role": role, "content": text})

    def call(self, id: str, name: str, arguments: str) -> None:
        """A call of the assistant's: part of its message where that is the last one. arguments: JSON."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.say("assistant", "")
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self._order[id] = len(self._order)

    def result(self, id: str, text: str, param: str) -> None:
        """What a call gave. Raises ApiError, with the field ``param``, where there was no such call.

        Templates show results without ids, so they are put in the order of their calls.
        """
        if id not in self._order:
            message = f"{param}: no call in front of it has the id {id[:100]!r}"
            raise ApiError(400, message, code="invalid_value", param=param)
        at = len(self.messages)
        while (
            self.messages[at - 1]["role"] == "tool"
            and self._order[self.messages[at - 1]["tool_call_id"]] > self._order[id]
        ):
            at -= 1
        self.messages.insert(at, {"role": "tool", "content": text, "tool_call_id": id})


def function_tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A tool as the chat template and grammars take it. parameters: a JSON schema."""
    given = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}
