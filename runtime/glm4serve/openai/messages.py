"""Messages and tools as OpenAI writes them, checked, and as the chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from glm4serve.schema import Items, Strict


class CacheControl(Strict):
    """Anthropic's mark of where a prompt should be cached. It has no effect: all of a prompt is, by itself."""

    type: Literal["ephemeral"]
    ttl: str | None = Field(None, max_length=64)


class TextPart(Strict):
    """Images, audio and files are refused: these models read text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


Content = str | Annotated[Items[TextPart], Field(min_length=1)]


class SystemMessage(Strict):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: str | None = None


class DeveloperMessage(Strict):
    """The same by its newer name."""

    role: Literal["developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Strict):
    """arguments: JSON, as text. parsed_arguments: the same once more, as OpenAI's client keeps it."""

    name: str
    arguments: str
    parsed_arguments: Any = None


class Call(Strict):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of streamed ones


class AssistantMessage(Strict):
    """An earlier answer, in the form in which it was given, and with what clients keep beside it.

    That has no effect: parsed is the content once more; thoughts are not shown to these models again.
    """

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Items[Call] | None = None
    name: str | None = None
    parsed: Any = None  # OpenAI's client
    reasoning: str | None = None  # vLLM, OpenRouter
    reasoning_details: Items[Any] | None = None  # OpenRouter
    thinking_blocks: Items[Any] | None = None  # LiteLLM
    provider_specific_fields: dict[str, Any] | None = None  # LiteLLM
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Strict):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Strict):
    """parameters: a JSON schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may want called."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Which one."""

    name: str


class NamedTool(Strict):
    """The one to be called."""

    type: Literal["function"]
    function: FunctionName


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As :meth:`glm4runtime.Session.chat` takes them."""
    return [_plain(message) for message in messages]


#: What has no effect; of parts and calls, where they stand in lists.
_LEFT_OUT: Any = {
    **dict.fromkeys(
        ("annotations", "parsed", "reasoning", "reasoning_details", "thinking_blocks", "provider_specific_fields"), True
    ),
    "content": {"__all__": {"cache_control"}},
    "tool_calls": {"__all__": {"index": True, "function": {"parsed_arguments"}}},
}


def _plain(message: Message) -> dict[str, Any]:
    given = message.model_dump(exclude_none=True, exclude=_LEFT_OUT)
    if given["role"] == "assistant":
        given.setdefault("content", "")
    return given


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same of tools."""
    return [
        {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}
        for tool in tools
    ]
