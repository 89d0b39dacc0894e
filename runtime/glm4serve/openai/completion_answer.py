"""An answer in the form of ``text_completion``, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from glm4runtime.engine.request import Delta, Result, Usage
from glm4serve.errors import ApiError, openai_shape
from glm4serve.models import Generator
from glm4serve.openai.logprobs import Offsets, for_completions, joined
from glm4serve.openai.usage import usage_object
from glm4serve.sse import event


class CompletionAnswer:
    """A :class:`~glm4serve.answering.Answer`: whole and in events from the same parts."""

    def __init__(
        self,
        generator: Generator,
        echo: Sequence[str | list[int]] | None,
        *,
        n: int,
        usage: bool,
        nothing: bool,
    ) -> None:
        """echo: prompts to be given in front of answers. n: choices for each prompt. usage: a stream ends with it.
        nothing: no tokens were wanted, so the one that was computed is left out.
        """
        self._tokenizer = generator.engine.tokenizer
        self._echo, self._n, self._usage, self._nothing = echo, n, usage, nothing
        self._offsets: dict[int, Offsets] = {}  # by choice
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generator.name,
            "system_fingerprint": generator.fingerprint,
        }

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """``text_completion``; choices of the first prompt come first."""
        choices = []
        for prompt, result in enumerate(results):
            for choice in result.choices:
                choices.append(self._choice(prompt, choice, result))
        return {**self._head, "choices": choices, "usage": usage_object(self._total(results))}

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        """The prompts, where they are wanted."""
        for prompt in range(len(self._echo or ())):
            for choice in range(self._n):
                yield self._chunk(prompt * self._n + choice, self._prompt_text(prompt))

    def delta(self, prompt: int, delta: Delta) -> Iterator[str]:
        """A chunk, where there's something to tell."""
        index = prompt * self._n + delta.choice
        logprobs = None
        if delta.logprobs:
            offsets = self._offsets.setdefault(index, Offsets(self._tokenizer))
            logprobs = for_completions(self._tokenizer, [one.token for one in delta.logprobs], delta.logprobs, offsets)
        if delta.content or logprobs or delta.finish_reason is not None:
            yield self._chunk(index, delta.content, logprobs, delta.finish_reason)

    def end(self, results: Sequence[Result]) -> Iterator[str]:
        """Usage where it's wanted, and the mark of the end."""
        if self._usage:
            yield event({**self._head, "choices": [], "usage": usage_object(self._total(results))})
        yield "data: [DONE]\n\n"

    def error(self, error: ApiError) -> Iterable[str]:
        """OpenAI's error object as an event; no [DONE] follows."""
        return [event(openai_shape(error))]

    def _choice(self, prompt: int, choice: Delta, result: Result) -> dict[str, Any]:
        text, logprobs = "" if self._nothing else choice.content, None
        echo = "" if self._echo is None else self._prompt_text(prompt)
        scored = () if self._nothing else choice.logprobs
        if choice.logprobs or result.prompt_logprobs is not None:
            offsets = Offsets(self._tokenizer, len(echo))
            logprobs = for_completions(self._tokenizer, [one.token for one in scored], scored, offsets)
        if result.prompt_logprobs is not None and logprobs is not None:
            ids = self._prompt_ids(prompt)
            offsets = Offsets(self._tokenizer, special=True)
            logprobs = joined(for_completions(self._tokenizer, ids, result.prompt_logprobs, offsets), logprobs)
        return {
            "index": prompt * self._n + choice.choice,
            "text": echo + text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._nothing else choice.finish_reason,
        }

    def _prompt_text(self, prompt: int) -> str:
        given = self._echo[prompt] if self._echo is not None else ""
        return given if isinstance(given, str) else self._tokenizer.decode(given, skip_special_tokens=False)

    def _prompt_ids(self, prompt: int) -> list[int]:
        given = self._echo[prompt] if self._echo is not None else ""
        return self._tokenizer.encode(given) if isinstance(given, str) else given

    def _total(self, results: Sequence[Result]) -> Usage:
        total = sum((result.usage for result in results), Usage(0, 0, 0))
        return Usage(total.prompt_tokens, total.cached_tokens, 0) if self._nothing else total

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None) -> str:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "choices": [choice]}
        if self._usage:
            chunk["usage"] = None
        return event(chunk)
