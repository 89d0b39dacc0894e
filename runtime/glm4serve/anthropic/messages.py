"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import anyio.to_thread
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4runtime.contract import UserError
from glm4runtime.engine.request import Request
from glm4runtime.sampling import SamplingParams
from glm4runtime.text.grammar import Structure, tool_structure
from glm4serve.answering import answered
from glm4serve.anthropic.answer import MessageAnswer
from glm4serve.anthropic.errors import anthropic_shape
from glm4serve.anthropic.fields import FreeChoice, NamedChoice, Prompted, ThinkingOn
from glm4serve.errors import ApiError, told
from glm4serve.json_route import JsonRoute
from glm4serve.models import Generator
from glm4serve.responses import SHAPES
from glm4serve.schema import Items, Strict
from glm4serve.service import service_of

router = APIRouter(route_class=JsonRoute)
SHAPES["/v1/messages"] = anthropic_shape


class Metadata(Strict):
    """It has no effect."""

    user_id: str | None = None


class MessageRequest(Prompted):
    """Anthropic's, without what these models can't do. metadata and service_tier have no effect."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: Items[str] | None = Field(None, max_length=16)
    temperature: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    prompt_field: ClassVar[str] = "messages"

    @property
    def streams(self) -> bool:
        """Whether events are wanted."""
        return bool(self.stream)

    def requests(self, generator: Generator) -> list[Request]:
        """The one that the engine is given. Raises ApiError and UserError for fields that don't go together."""
        return [_engine_request(self, generator)]

    def answer(self, generator: Generator) -> MessageAnswer:
        """Its answer's form."""
        return MessageAnswer(generator, most=self.max_tokens, thoughts=self.shows_thoughts, one_call=_one_call(self))


class CountRequest(Prompted):
    """What would be the prompt."""


@router.post("/v1/messages", response_model=None)
async def messages(body: MessageRequest, http: HttpRequest) -> Response:
    """An answer to a conversation, whole or as events."""
    return await answered(http, body)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, http: HttpRequest) -> dict[str, int]:
    """Tokens of the prompt that a conversation becomes."""
    engine = service_of(http).models.generator(body.model).engine
    talk, tools, variables = body.template_messages(), body.template_tools(), body.template_variables()

    def count() -> int:
        return len(engine.tokenizer.encode(engine.template.render(talk, tools, **variables)))

    try:
        return {"input_tokens": await anyio.to_thread.run_sync(count)}
    except UserError as error:
        raise told(error, "messages") from error


def _engine_request(body: MessageRequest, generator: Generator) -> Request:
    if isinstance(body.thinking, ThinkingOn) and body.thinking.budget_tokens >= body.max_tokens:
        raise _refused("thinking.budget_tokens", f"expected less than max_tokens, {body.max_tokens}")
    if body.stop_sequences is not None and "" in body.stop_sequences:
        raise _refused("stop_sequences", "one of them is empty")
    talk, tools = body.template_messages(), body.template_tools()
    last = next((message["role"] for message in reversed(talk) if message["role"] != "system"), None)
    if last is None:
        raise _refused("messages", "there is none of the user's")
    if last not in ("user", "tool"):
        what = f"the last one is the {last}'s; expected the user's: answers are begun anew, not continued"
        raise _refused("messages", what)
    given = {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p}
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Request(
        messages=talk,
        tools=tools,
        template_variables=body.template_variables(),
        params=SamplingParams(
            max_new_tokens=min(body.max_tokens, generator.most_tokens), **{"temperature": 1.0, **known}
        ),
        stop=body.stop_sequences or [],
        structure=_structure(body, tools),
    )


def _structure(body: MessageRequest, tools: list[dict[str, Any]] | None) -> Structure | None:
    form = body.output_config.format if body.output_config else None
    if form is not None and tools:
        raise _refused("output_config.format", "goes with no tools unless tool_choice is none")
    if form is not None:
        return Structure(json_schema=form.schema_)
    if not tools or body.tool_choice is None or body.tool_choice.type == "auto":
        return None
    choice: Any = "required"
    if isinstance(body.tool_choice, NamedChoice):
        choice = {"type": "function", "function": {"name": body.tool_choice.name}}
    return tool_structure(tools, choice, parallel=not _one_call(body))


def _one_call(body: MessageRequest) -> bool:
    return isinstance(body.tool_choice, FreeChoice | NamedChoice) and body.tool_choice.disable_parallel_tool_use


def _refused(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what}", code="invalid_value", param=param)
