"""The body of a completion, and what the engine is asked for it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from glm4runtime.engine.request import Request
from glm4serve.errors import ApiError
from glm4serve.models import Generator
from glm4serve.openai.completion_answer import CompletionAnswer
from glm4serve.openai.fields import SamplingFields
from glm4serve.openai.structure import StructuredOutputs, structure_of
from glm4serve.schema import Items

_MAX_TOKENS = 16  # OpenAI's default
_MOST_PROMPTS = 128

Ids = Annotated[Items[int], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """OpenAI's without ``suffix``; a prompt is text, token ids, or a list of either."""

    prompt: (
        str
        | Ids
        | Annotated[Items[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[Items[Ids], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=100)
    best_of: int | None = Field(None, ge=1, le=64)
    structured_outputs: StructuredOutputs | None = None

    prompt_field: ClassVar[str] = "prompt"

    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)

    def requests(self, generator: Generator) -> list[Request]:
        """One for each prompt. Raises ApiError and UserError for fields that don't go together."""
        most = self._most
        _check(self, most)
        params = self.params(min(max(most, 1), generator.most_tokens))
        structure = structure_of(None, self.structured_outputs)
        return [
            Request(
                prompt=prompt,
                params=params,
                stop=self.stops(),
                structure=structure,
                n=self.n or 1,
                best_of=self.best_of,
                logprobs=self.logprobs,
                prompt_logprobs=self.logprobs if self.echo else None,
                salt=self.cache_salt or "",
            )
            for prompt in self.prompts()
        ]

    def answer(self, generator: Generator) -> CompletionAnswer:
        """Its answers' form."""
        echo = self.prompts() if self.echo else None
        return CompletionAnswer(generator, echo, n=self.n or 1, usage=self.tells_usage, nothing=not self._most)

    @property
    def _most(self) -> int:
        return _MAX_TOKENS if self.max_tokens is None else self.max_tokens


def _check(body: CompletionRequest, most: int) -> None:
    echo = bool(body.echo)
    wrong = None
    if not most and not echo:
        wrong = "max_tokens", "0 goes with echo: there is nothing else to give"
    elif body.streams and echo and body.logprobs is not None:
        wrong = "logprobs", "goes with echo in whole answers only: a prompt's are known at its end"
    elif body.streams and not most:
        wrong = "stream", "goes with max_tokens above 0"
    elif body.stream_options is not None and not body.streams:
        wrong = "stream_options", "goes with stream true"
    elif body.best_of is not None and body.best_of < (body.n or 1):
        wrong = "best_of", "must be at least n"
    if wrong is not None:
        raise ApiError(400, ": ".join(wrong), code="invalid_value", param=wrong[0])
