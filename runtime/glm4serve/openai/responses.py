"""``POST /v1/responses``, without a memory: each request has the whole conversation, and nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4runtime.engine.request import Request
from glm4runtime.sampling import SamplingParams
from glm4runtime.text.grammar import Structure, tool_structure
from glm4serve.answering import answered
from glm4serve.conversation import function_tool
from glm4serve.errors import ApiError
from glm4serve.json_route import JsonRoute
from glm4serve.models import Generator
from glm4serve.openai.fields import PassedOver
from glm4serve.openai.response_answer import ResponseAnswer
from glm4serve.openai.response_input import Input, template_messages
from glm4serve.openai.structure import AnyObject, AnyText
from glm4serve.schema import Items, Strict

router = APIRouter(route_class=JsonRoute)


class FunctionTool(Strict):
    """OpenAI's own tools, which have other types, are refused. parameters: a JSON schema."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    """The one to be called."""

    type: Literal["function"]
    name: str


class SchemaFormat(Strict):
    """JSON of this schema. strict: it is always enforced, whatever this says."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Strict):
    """The form of the answer's text."""

    format: Annotated[AnyText | AnyObject | SchemaFormat, Field(discriminator="type")] = AnyText(type="text")


class Reasoning(Strict):
    """effort none: the template is told that no thought is wanted; these models know no other degrees.

    summary has no effect: thoughts are given in whole.
    """

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None


class StreamOptions(Strict):
    """Padding against listeners isn't sent."""

    include_obfuscation: Literal[False] = False


class ResponseRequest(PassedOver):
    """OpenAI's, without what these models can't do. include and client_metadata have no effect."""

    model: str | None = Field(None, max_length=256)
    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: Items[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    include: Items[Literal["reasoning.encrypted_content"]] | None = None  # reasoning items are whole without it
    client_metadata: dict[str, str] | None = None  # Codex's, of itself

    prompt_field: ClassVar[str] = "input"

    @property
    def streams(self) -> bool:
        """Whether events are wanted."""
        return bool(self.stream)

    def requests(self, generator: Generator) -> list[Request]:
        """The one that the engine is given. Raises ApiError and UserError for fields that don't go together."""
        return [_engine_request(self, generator)]

    def answer(self, generator: Generator) -> ResponseAnswer:
        """Its answer's form."""
        return ResponseAnswer(generator, _given(self), one_call=self.parallel_tool_calls is False)


@router.post("/v1/responses", response_model=None)
async def responses(body: ResponseRequest, http: HttpRequest) -> Response:
    """An answer to a conversation, whole or as events."""
    return await answered(http, body)


def _engine_request(body: ResponseRequest, generator: Generator) -> Request:
    tools, structure = _tools(body), _form(body)
    if structure is not None and tools:
        raise _refused("text.format", "goes with no tools unless tool_choice is none")
    if body.stream_options is not None and not body.stream:
        raise _refused("stream_options", "goes with stream true")
    if tools:
        choice: Any = body.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        structure = tool_structure(tools, choice, parallel=body.parallel_tool_calls is not False)
    given = {"temperature": body.temperature, "top_p": body.top_p}
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    most = min(body.max_output_tokens or generator.most_tokens, generator.most_tokens)
    quiet = body.reasoning is not None and body.reasoning.effort == "none"
    return Request(
        messages=template_messages(body.instructions, body.input),
        tools=tools,
        template_variables={"enable_thinking": False} if quiet else {},
        params=SamplingParams(max_new_tokens=most, **{"temperature": 1.0, **known}),
        structure=structure,
    )


def _tools(body: ResponseRequest) -> list[dict[str, Any]] | None:
    """Tools that the template tells of: none where none may be called."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise _refused("tool_choice", "there are no tools")
        return None
    if body.tool_choice == "none":
        return None
    return [function_tool(tool.name, tool.description, tool.parameters) for tool in body.tools]


def _form(body: ResponseRequest) -> Structure | None:
    form = body.text.format if body.text else None
    if isinstance(form, SchemaFormat):
        return Structure(json_schema=form.schema_)
    return Structure(json_object=True) if isinstance(form, AnyObject) else None


def _given(body: ResponseRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    text = (body.text or TextSettings()).model_dump(by_alias=True, exclude_none=True)
    choice = body.tool_choice or "auto"
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": text,
        "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _refused(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what}", code="invalid_value", param=param)
