"""The body of a chat completion, and what the engine is asked for it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from glm4runtime.engine.request import Request
from glm4runtime.text.grammar import tool_structure
from glm4serve.errors import ApiError
from glm4serve.models import Generator
from glm4serve.openai.chat_answer import ChatAnswer
from glm4serve.openai.fields import SamplingFields
from glm4serve.openai.messages import Message, NamedTool, Tool, template_messages, template_tools
from glm4serve.openai.structure import ResponseFormat, StructuredOutputs, structure_of
from glm4serve.schema import Items

#: What the template is given anyway, and can't be changed by the client.
_RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt"})


class ChatRequest(SamplingFields):
    """OpenAI's, without what these models can't do, and vLLM's additions."""

    messages: Items[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Items[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    modalities: Items[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    prompt_field: ClassVar[str] = "messages"

    def requests(self, generator: Generator) -> list[Request]:
        """The one that the engine is given. Raises ApiError and UserError for fields that don't go together."""
        return [_engine_request(self, generator)]

    def answer(self, generator: Generator) -> ChatAnswer:
        """Its answer's form."""
        one_call = self.parallel_tool_calls is False
        return ChatAnswer(generator, n=self.n or 1, usage=self.tells_usage, one_call=one_call)


def _engine_request(body: ChatRequest, generator: Generator) -> Request:
    tools = _tools(body)
    structure = structure_of(body.response_format, body.structured_outputs)
    if structure is not None and tools:
        raise ApiError(
            400,
            "response_format: goes with no tools unless tool_choice is none: an answer in this form can't be a call",
            code="invalid_value",
            param="response_format",
        )
    if tools:
        choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice
        structure = tool_structure(tools, choice, parallel=body.parallel_tool_calls is not False)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: goes with logprobs true", code="invalid_value", param="top_logprobs")
    if body.stream_options is not None and not body.streams:
        raise ApiError(400, "stream_options: goes with stream true", code="invalid_value", param="stream_options")
    variables = body.chat_template_kwargs or {}
    if reserved := _RESERVED & variables.keys():
        raise ApiError(
            400,
            f"chat_template_kwargs: {min(reserved)} isn't the client's to set",
            code="invalid_value",
            param="chat_template_kwargs",
        )
    most = body.max_completion_tokens or body.max_tokens
    return Request(
        messages=template_messages(body.messages),
        tools=tools,
        template_variables=variables,
        params=body.params(min(most or generator.most_tokens, generator.most_tokens)),
        stop=body.stops(),
        structure=structure,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        salt=body.cache_salt or "",
    )


def _tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """Tools that the template tells of: none where none may be called."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: there are no tools", code="invalid_value", param="tool_choice")
        return None
    return None if body.tool_choice == "none" else template_tools(body.tools)
