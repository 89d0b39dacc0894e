"""An answer in the form of ``chat.completion``, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from glm4runtime.engine.request import Delta, Result, Usage
from glm4runtime.text.answers import ToolCall
from glm4serve.errors import ApiError, openai_shape
from glm4serve.models import Generator
from glm4serve.openai.logprobs import for_chat
from glm4serve.openai.usage import usage_object
from glm4serve.sse import event


class ChatAnswer:
    """A :class:`~glm4serve.answering.Answer`: whole and in events from the same parts."""

    def __init__(self, generator: Generator, *, n: int, usage: bool, one_call: bool) -> None:
        """n: choices. usage: a stream ends with it. one_call: calls behind an answer's first are left out."""
        self._generator, self._n, self._usage, self._one_call = generator, n, usage, one_call
        self._calls = [0] * n  # so many of each choice were given
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": generator.name,
            "system_fingerprint": generator.fingerprint,
        }

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """``chat.completion``."""
        result = results[0]
        choices = [
            {
                "index": choice.choice,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice),
                "finish_reason": choice.finish_reason,
            }
            for choice in result.choices
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_object(result.usage)}

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        """Each choice's role."""
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, prompt: int, delta: Delta) -> Iterator[str]:
        """A chunk, where there's something to tell."""
        index, told = delta.choice, dict[str, Any]()
        if delta.thought:
            told["reasoning_content"] = delta.thought
        if delta.content:
            told["content"] = delta.content
        before = self._calls[index]
        if calls := self._call_objects(index, delta.tool_calls):
            told["tool_calls"] = [{"index": before + at, **call} for at, call in enumerate(calls)]
        logprobs = self._logprobs(delta)
        if told or logprobs:
            yield self._chunk(index, told, logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(index, {}, None, delta.finish_reason)

    def end(self, results: Sequence[Result]) -> Iterator[str]:
        """Usage where it's wanted, and the mark of the end."""
        if self._usage:
            usage = usage_object(sum((result.usage for result in results), Usage(0, 0, 0)))
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def error(self, error: ApiError) -> Iterable[str]:
        """OpenAI's error object as an event; no [DONE] follows."""
        return [event(openai_shape(error))]

    def _message(self, choice: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.thought:
            message["reasoning_content"] = choice.thought
        if calls := self._call_objects(choice.choice, choice.tool_calls):
            message["tool_calls"] = calls
            message["content"] = choice.content or None
        return message

    def _call_objects(self, index: int, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        if self._one_call:
            calls = calls[: 1 - self._calls[index]]
        self._calls[index] += len(calls)
        return [call_object(call) for call in calls]

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return for_chat(self._generator.engine.tokenizer, delta.logprobs) if delta.logprobs else None

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._usage:
            chunk["usage"] = None
        return event(chunk)


def call_object(call: ToolCall) -> dict[str, Any]:
    """A call, with an id of its own."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
