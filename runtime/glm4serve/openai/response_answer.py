"""An answer in the form of ``response``, whole or in events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from glm4runtime.engine.request import Delta, Result
from glm4runtime.text.answers import ToolCall
from glm4serve.errors import ApiError
from glm4serve.models import Generator
from glm4serve.sse import event

# An item of words, by its type: its name in ids, its parts' type, what its events are called.
_WORDS = {"reasoning": ("rs", "reasoning_text"), "message": ("msg", "output_text")}


class ResponseAnswer:
    """A :class:`~glm4serve.answering.Answer`: whole and in events from the same parts."""

    def __init__(self, generator: Generator, given: Mapping[str, Any], *, one_call: bool) -> None:
        """given: what a response repeats of its request. one_call: calls behind the first are left out."""
        self._tokenizer, self._one_call = generator.engine.tokenizer, one_call
        self._events = 0
        self._calls = 0  # given so far
        self._output: list[dict[str, Any]] = []  # items that are whole
        self._open: dict[str, Any] | None = None  # the item that goes on
        self._response = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": generator.name,
            "output": self._output,
            **given,
            "usage": None,
        }

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """``response``."""
        choice = results[0].choices[0]
        for kind, text in (("reasoning", choice.thought), ("message", choice.content)):
            if text:
                self._output.append(_words_item(kind, text))
        if choice.finish_reason == "length" and self._output:
            self._output[-1]["status"] = "incomplete"
        self._output.extend(_call_item(call) for call in self._wanted(choice.tool_calls))
        return self._ended(results[0])

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        """The response without output."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def delta(self, prompt: int, delta: Delta) -> Iterator[str]:
        """What is new, in items."""
        for kind, text in (("reasoning", delta.thought), ("message", delta.content)):
            if text:
                yield from self._told(kind, text)
        for call in self._wanted(delta.tool_calls):
            yield from self._closed()
            yield from self._called(_call_item(call))

    def end(self, results: Sequence[Result]) -> Iterator[str]:
        """The whole response."""
        cut = "incomplete" if results[0].choices[0].finish_reason == "length" else "completed"
        yield from self._closed(cut)
        yield self._event(f"response.{cut}", response=self._ended(results[0]))

    def error(self, error: ApiError) -> Iterable[str]:
        """What went wrong, as the last event."""
        code = error.code or "server_error"
        yield self._event("error", code=code, message=error.message, param=error.param)
        failed = {**self._response, "status": "failed", "error": {"code": "server_error", "message": error.message}}
        yield self._event("response.failed", response=failed)

    def _ended(self, result: Result) -> dict[str, Any]:
        cut, usage = result.choices[0].finish_reason == "length", result.usage
        thoughts = [part["text"] for item in self._output if item["type"] == "reasoning" for part in item["content"]]
        return {
            **self._response,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": sum(len(self._tokenizer.encode(t)) for t in thoughts)},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _wanted(self, calls: Sequence[ToolCall]) -> Sequence[ToolCall]:
        if self._one_call:
            calls = calls[: 1 - self._calls]
        self._calls += len(calls)
        return calls

    def _event(self, name: str, /, **fields: Any) -> str:
        self._events += 1
        return event({"type": name, "sequence_number": self._events - 1, **fields}, name)

    def _at(self, item: Mapping[str, Any], part: bool = False) -> dict[str, Any]:
        """Where something is; of the item that is not whole yet, or was just made so."""
        at = {"item_id": item["id"], "output_index": len(self._output)}
        return {**at, "content_index": 0} if part else at

    def _told(self, kind: str, text: str) -> Iterator[str]:
        if self._open is None or self._open["type"] != kind:
            yield from self._closed()
            item = self._open = _words_item(kind, "")
            begun = {**item, "status": "in_progress", "content": []}
            yield self._event("response.output_item.added", output_index=len(self._output), item=begun)
            yield self._event("response.content_part.added", **self._at(item, part=True), part=item["content"][0])
        item = self._open
        item["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{_WORDS[kind][1]}.delta", **self._at(item, part=True), delta=text, **extra)

    def _closed(self, status: str = "completed") -> Iterator[str]:
        if self._open is None:
            return
        item, self._open = self._open, None
        item["status"] = status
        kind, part = item["type"], item["content"][0]
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{_WORDS[kind][1]}.done", **self._at(item, part=True), text=part["text"], **extra)
        yield self._event("response.content_part.done", **self._at(item, part=True), part=part)
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _called(self, item: dict[str, Any]) -> Iterator[str]:
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=len(self._output), item=begun)
        arguments, name = item["arguments"], "response.function_call_arguments"
        yield self._event(f"{name}.delta", **self._at(item), delta=arguments)
        yield self._event(f"{name}.done", **self._at(item), name=item["name"], arguments=arguments)
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)


def _words_item(kind: str, text: str) -> dict[str, Any]:
    prefix, part = _WORDS[kind]
    item: dict[str, Any] = {"type": kind, "id": f"{prefix}_{secrets.token_hex(12)}", "status": "completed"}
    if kind == "reasoning":
        return {**item, "summary": [], "content": [{"type": part, "text": text}]}
    return {**item, "role": "assistant", "content": [{"type": part, "text": text, "annotations": [], "logprobs": []}]}


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": f"call_{secrets.token_hex(12)}",
        "name": call.name,
        "arguments": json.dumps(call.arguments, ensure_ascii=False),
        "status": "completed",
    }
