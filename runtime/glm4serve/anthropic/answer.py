"""An answer in the form of Anthropic's message, whole or in events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from glm4runtime.engine.request import Delta, Result, Usage
from glm4runtime.text.answers import ToolCall
from glm4serve.anthropic.errors import anthropic_shape
from glm4serve.errors import ApiError
from glm4serve.models import Generator
from glm4serve.sse import event

_EMPTY: dict[str, dict[str, Any]] = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}


class MessageAnswer:
    """A :class:`~glm4serve.answering.Answer`: whole and in events from the same parts."""

    def __init__(self, generator: Generator, *, most: int, thoughts: bool, one_call: bool) -> None:
        """most: tokens that were asked for. thoughts: whether they are told. one_call: others are left out."""
        self._most, self._thoughts, self._one_call = most, thoughts, one_call
        self._calls = 0  # given so far
        self._blocks = 0  # begun so far
        self._open: str | None = None  # the last one's type, while it goes on
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": generator.name,
        }

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The message."""
        choice, content = results[0].choices[0], list[dict[str, Any]]()
        if choice.thought and self._thoughts:
            content.append({**_EMPTY["thinking"], "thinking": choice.thought})
        if choice.content:
            content.append({"type": "text", "text": choice.content})
        content += [{**_call_block(call), "input": call.arguments} for call in self._wanted(choice.tool_calls)]
        return {**self._head, "content": content, **self._ending(results[0]), "usage": _usage(results[0].usage)}

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        """The message without content, and the tokens that are known by now."""
        ending = {"stop_reason": None, "stop_sequence": None}
        yield _event(
            "message_start",
            message={**self._head, "content": [], **ending, "usage": _usage(Usage(prompt_tokens, 0, 0))},
        )
        yield _event("ping")

    def delta(self, prompt: int, delta: Delta) -> Iterator[str]:
        """What is new, in blocks."""
        if delta.thought and self._thoughts:
            yield from self._told("thinking", {"type": "thinking_delta", "thinking": delta.thought})
        if delta.content:
            yield from self._told("text", {"type": "text_delta", "text": delta.content})
        for call in self._wanted(delta.tool_calls):
            yield from self._closed()
            yield self._begun("tool_use", {**_call_block(call), "input": {}})
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            yield self._part({"type": "input_json_delta", "partial_json": arguments})
            yield from self._closed()

    def end(self, results: Sequence[Result]) -> Iterator[str]:
        """Why it ended, the tokens, and the mark of the end."""
        yield from self._closed()
        yield _event("message_delta", delta=self._ending(results[0]), usage=_usage(results[0].usage))
        yield _event("message_stop")

    def error(self, error: ApiError) -> Iterable[str]:
        """Anthropic's error object as an event."""
        return [event(anthropic_shape(error), "error")]

    def _ending(self, result: Result) -> dict[str, Any]:
        choice = result.choices[0]
        reason, sequence = "end_turn", None
        if choice.finish_reason == "tool_calls":
            reason = "tool_use"
        elif choice.finish_reason == "length":
            full = result.usage.completion_tokens >= self._most
            reason = "max_tokens" if full else "model_context_window_exceeded"
        elif isinstance(choice.stop, str):
            reason, sequence = "stop_sequence", choice.stop
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _wanted(self, calls: Sequence[ToolCall]) -> Sequence[ToolCall]:
        if self._one_call:
            calls = calls[: 1 - self._calls]
        self._calls += len(calls)
        return calls

    def _told(self, kind: str, part: dict[str, Any]) -> Iterator[str]:
        if self._open != kind:
            yield from self._closed()
            yield self._begun(kind, _EMPTY[kind])
        yield self._part(part)

    def _begun(self, kind: str, block: dict[str, Any]) -> str:
        self._open = kind
        self._blocks += 1
        return _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _part(self, part: dict[str, Any]) -> str:
        return _event("content_block_delta", index=self._blocks - 1, delta=part)

    def _closed(self) -> Iterator[str]:
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._blocks - 1)


def _event(name: str, **fields: Any) -> str:
    return event({"type": name, **fields}, name)


def _call_block(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name}


def _usage(usage: Usage) -> dict[str, Any]:
    """input_tokens: those that were computed, the cache's apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
