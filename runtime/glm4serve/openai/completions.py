"""``POST /v1/completions``: text that goes on."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glm4runtime.contract import UserError
from glm4runtime.engine.request import Request
from glm4serve.answering import submit
from glm4serve.errors import ApiError, told
from glm4serve.openai.completion_answer import CompletionAnswer
from glm4serve.openai.fields import SamplingFields
from glm4serve.openai.structure import StructuredOutputs, structure_of
from glm4serve.schema import JsonRoute
from glm4serve.service import service_of

router = APIRouter(route_class=JsonRoute)

_MAX_TOKENS = 16  # OpenAI's default
_MOST_PROMPTS = 128

Ids = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """OpenAI's without ``suffix``; a prompt is text, token ids, or a list of either."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=100)
    best_of: int | None = Field(None, ge=1, le=64)
    structured_outputs: StructuredOutputs | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
    """How prompts go on, whole or as events."""
    generator = service_of(http).models.generator(body.model)
    echo, prompts = bool(body.echo), body.prompts()
    most = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    _check(body, echo, most)
    try:
        params, structure = (
            body.params(min(max(most, 1), generator.most_tokens)),
            structure_of(None, body.structured_outputs),
        )
        requests = [
            Request(
                prompt=prompt,
                params=params,
                stop=body.stops(),
                structure=structure,
                n=body.n or 1,
                best_of=body.best_of,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if echo else None,
                salt=body.cache_salt or "",
            )
            for prompt in prompts
        ]
    except UserError as error:
        raise told(error) from error
    run = await submit(http, generator, requests, param="prompt")
    answer = CompletionAnswer(
        generator, prompts if echo else None, n=body.n or 1, usage=body.tells_usage, nothing=not most
    )
    if body.streams:
        return run.stream(answer)
    return JSONResponse(answer.whole(await run.whole()))


def _check(body: CompletionRequest, echo: bool, most: int) -> None:
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
