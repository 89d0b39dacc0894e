"""Messages, tools and settings as Anthropic writes them, checked, and as the chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from glm4serve.conversation import Conversation, function_tool
from glm4serve.errors import ApiError
from glm4serve.schema import Items, Strict


class CacheControl(Strict):
    """Where a prompt should be cached. It has no effect: all of a prompt is, by itself."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: str | None = Field(None, max_length=64)


class Cached(Strict):
    """What may carry the mark."""

    cache_control: CacheControl | None = None


class TextBlock(Cached):
    """Images and documents are refused: these models read text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingBlock(Strict):
    """A thought of an earlier answer: these models are not shown them again."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Cached):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: None = None


class ToolResultBlock(Cached):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Items[TextBlock] = ""
    is_error: bool | None = None


class UserMessage(Strict):
    """What the user says, and what was called for."""

    role: Literal["user"]
    content: str | Items[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]]


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | Items[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]


class Effort(Strict):
    """How much effort an answer is worth. It has no effect: these models know no degrees."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class SystemMessage(Strict):
    """Instructions that came later than ``system``: the template says where they stand."""

    role: Literal["system"]
    content: str | Items[TextBlock]
    output_config: Effort | None = None
    clear_at: Literal["never"] | None = None


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class Tool(Cached):
    """A function that the model may want called; Anthropic's own tools, which have other types, are refused.

    eager_input_streaming has no effect: a call is sent when its JSON is whole.
    """

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None


class FreeChoice(Strict):
    """auto: as the model likes; any: at least one call."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool = False


class NamedChoice(Strict):
    """This one is called."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(Strict):
    """None is called."""

    type: Literal["none"]


ToolChoice = Annotated[FreeChoice | NamedChoice | NoChoice, Field(discriminator="type")]


class ThinkingOn(Strict):
    """budget_tokens is a goal to Anthropic, too, and no limit."""

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1024)
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(Strict):
    """The model's own way."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingOff(Strict):
    """The template is told; thoughts of a model that has them anyway are left out."""

    type: Literal["disabled"]


Thinking = Annotated[ThinkingOn | ThinkingAdaptive | ThinkingOff, Field(discriminator="type")]


class JsonFormat(Strict):
    """JSON of this schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Effort):
    """The form that an answer must have."""

    format: JsonFormat | None = None


class KeptTurns(Strict):
    """Thoughts of so many turns."""

    type: Literal["thinking_turns"]
    value: int = Field(ge=1)


class KeptAll(Strict):
    """All of them."""

    type: Literal["all"]


class ClearThinking(Strict):
    """Which old thoughts stay in the prompt. It has no effect: these models' templates leave out all of them."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | Annotated[KeptTurns | KeptAll, Field(discriminator="type")] | None = None


class ContextManagement(Strict):
    """What is left out of a long conversation; other edits than this one would change the prompt, and are refused."""

    edits: Items[ClearThinking] | None = None


class Prompted(Cached):
    """What a prompt is made of."""

    model: str | None = Field(None, max_length=256)
    messages: Items[Message] = Field(min_length=1)
    system: str | Items[TextBlock] | None = None
    tools: Items[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None

    def template_messages(self) -> list[dict[str, Any]]:
        """As the chat template takes them. Raises ApiError for results without calls."""
        talk = Conversation()
        if self.system:
            talk.say("system", _joined(self.system))
        for number, message in enumerate(self.messages):
            if isinstance(message, AssistantMessage):
                _add_answer(talk, message)
            elif isinstance(message, SystemMessage):
                talk.say("system", _joined(message.content))
            else:
                _add_turn(talk, message, f"messages[{number}]")
        return talk.messages

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Tools that the template tells of: none where none may be called."""
        if not self.tools:
            if isinstance(self.tool_choice, NamedChoice) or (self.tool_choice and self.tool_choice.type == "any"):
                raise ApiError(400, "tool_choice: there are no tools", code="invalid_value", param="tool_choice")
            return None
        if isinstance(self.tool_choice, NoChoice):
            return None
        return [function_tool(tool.name, tool.description, tool.input_schema) for tool in self.tools]

    def template_variables(self) -> dict[str, Any]:
        """``enable_thinking``, which templates know that have a choice; nothing where it's the model's own."""
        if self.thinking is None or isinstance(self.thinking, ThinkingAdaptive):
            return {}
        return {"enable_thinking": isinstance(self.thinking, ThinkingOn)}

    @property
    def shows_thoughts(self) -> bool:
        """Whether an answer tells of them."""
        if isinstance(self.thinking, ThinkingOff):
            return False
        return self.thinking is None or self.thinking.display != "omitted"


def _joined(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _add_turn(talk: Conversation, message: UserMessage, where: str) -> None:
    if isinstance(message.content, str):
        talk.say("user", message.content)
        return
    words: list[str] = []
    for number, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            words.append(block.text)
            continue
        if words:  # templates show results behind their calls, so nothing of the user's may come between
            raise ApiError(
                400,
                f"{where}.content[{number}]: tool results come in front of a turn's text",
                code="invalid_value",
                param=f"{where}.content[{number}]",
            )
        text = _joined(block.content)
        # The template has no other way to say so.
        talk.result(block.tool_use_id, f"Error: {text}" if block.is_error else text, f"{where}.content[{number}]")
    if words or not message.content:
        talk.say("user", "".join(words))


def _add_answer(talk: Conversation, message: AssistantMessage) -> None:
    if isinstance(message.content, str):
        talk.say("assistant", message.content)
        return
    talk.say("assistant", "".join(block.text for block in message.content if isinstance(block, TextBlock)))
    for block in message.content:
        if isinstance(block, ToolUseBlock):
            talk.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
