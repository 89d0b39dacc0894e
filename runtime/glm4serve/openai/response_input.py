"""Items that ``/v1/responses`` takes, checked, and as the chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from glm4serve.conversation import Conversation
from glm4serve.schema import Items, Strict

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    """Images, audio and files are refused: these models read text."""

    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """Text of an earlier answer. parsed: the same once more, as OpenAI's client keeps it."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None
    parsed: Any = None


Part = Annotated[InputText | OutputText, Field(discriminator="type")]


class MessageItem(Strict):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Items[Part]
    id: str | None = None
    status: Status | None = None


class CallItem(Strict):
    """A call that the assistant made. arguments: JSON, as text. parsed_arguments: the same, kept by OpenAI's client."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = None
    id: str | None = None
    status: Status | None = None


class ResultItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[InputText]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Strict):
    """A thought."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Strict):
    """A thought of another model, in short."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(Strict):
    """A thought of an earlier answer: these models are not shown them again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Items[SummaryText] | None = None
    content: Items[ReasoningText] | None = None
    encrypted_content: None = None
    status: Status | None = None


def _kind(item: Any) -> Any:
    """A message's type may be missing."""
    return (item.get("type") if isinstance(item, dict) else getattr(item, "type", None)) or "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def _form(given: Any) -> str:
    return "text" if isinstance(given, str) else "items"


#: A text is what the user says. Told apart by hand, so that errors are of what was given and not of both.
Input = Annotated[
    Annotated[str, Tag("text")] | Annotated[Items[Item], Field(min_length=1), Tag("items")], Discriminator(_form)
]


def template_messages(instructions: str | None, given: str | Sequence[Item]) -> list[dict[str, Any]]:
    """As the chat template takes them. Raises ApiError for results without calls."""
    talk = Conversation()
    if instructions:
        talk.say("system", instructions)
    if isinstance(given, str):
        talk.say("user", given)
        return talk.messages
    for number, item in enumerate(given):
        if isinstance(item, MessageItem):
            talk.say("system" if item.role == "developer" else item.role, _joined(item.content))
        elif isinstance(item, CallItem):
            talk.call(item.call_id, item.name, item.arguments)
        elif isinstance(item, ResultItem):
            talk.result(item.call_id, _joined(item.output), f"input[{number}].call_id")
    return talk.messages


def _joined(content: str | Sequence[InputText | OutputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
