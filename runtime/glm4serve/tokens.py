"""llama.cpp's ``/tokenize``, ``/detokenize`` and ``/apply-template``: what a prompt becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4runtime.contract import UserError
from glm4serve.errors import told
from glm4serve.json_route import JsonRoute
from glm4serve.models import Generator
from glm4serve.openai.messages import Message, Tool, template_messages, template_tools
from glm4serve.schema import Items, Strict
from glm4serve.service import service_of

router = APIRouter(route_class=JsonRoute)
T = TypeVar("T")


class TokenizeRequest(Strict):
    """with_pieces: each token's text too, or its bytes where they are no whole character."""

    model: str | None = None
    content: str
    with_pieces: bool = False


class DetokenizeRequest(Strict):
    """Special tokens are shown."""

    model: str | None = None
    tokens: Items[int] = Field(max_length=1 << 17)


class TemplateRequest(Strict):
    """As a chat's."""

    model: str | None = None
    messages: Items[Message] = Field(min_length=1)
    tools: Items[Tool] | None = None


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, http: HttpRequest) -> Response:
    """Token ids of a text, as a prompt would have them."""
    generator = service_of(http).models.generator(body.model)

    def answer() -> bytes:
        ids = generator.engine.tokenizer.encode(body.content)
        tokens: list[Any] = [{"id": id, "piece": _piece(generator, id)} for id in ids] if body.with_pieces else ids
        return to_json({"tokens": tokens, "count": len(ids), "max_model_len": generator.most_tokens})

    return Response(await _in_thread(answer), media_type="application/json")


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, http: HttpRequest) -> dict[str, str]:
    """The text of token ids."""
    generator = service_of(http).models.generator(body.model)
    return {
        "content": await _in_thread(lambda: generator.engine.tokenizer.decode(body.tokens, skip_special_tokens=False))
    }


@router.post("/apply-template")
async def apply_template(body: TemplateRequest, http: HttpRequest) -> dict[str, str]:
    """The prompt that a conversation becomes."""
    generator = service_of(http).models.generator(body.model)
    messages = template_messages(body.messages)
    tools = template_tools(body.tools) if body.tools else None
    return {"prompt": await _in_thread(lambda: generator.engine.template.render(messages, tools))}


def _piece(generator: Generator, token: int) -> str | list[int]:
    data = generator.engine.tokenizer.token_bytes(token)
    try:
        text: str = data.decode()
    except UnicodeDecodeError:
        return list(data)
    return text


async def _in_thread(function: Callable[[], T]) -> T:
    """Call it beside the event loop. Raises ApiError."""
    try:
        return await anyio.to_thread.run_sync(function)
    except UserError as error:
        raise told(error) from error
