"""The form that an answer must have: ``response_format``, and vLLM's ``structured_outputs``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from glm4runtime.text.grammar import Structure
from glm4serve.errors import ApiError
from glm4serve.schema import Strict


class AnyText(Strict):
    """No form."""

    type: Literal["text"]


class AnyObject(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """strict: it is always enforced, whatever this says."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class BySchema(Strict):
    """JSON of this schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[AnyText | AnyObject | BySchema, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's; exactly one of them. grammar: llguidance's dialect of Lark."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None


def structure_of(response_format: ResponseFormat | None, outputs: StructuredOutputs | None) -> Structure | None:
    """What the engine is given. Raises ApiError where two forms are asked for, UserError for one that can't be."""
    forms: list[dict[str, Any]] = []
    if isinstance(response_format, AnyObject):
        forms.append({"json_object": True})
    elif isinstance(response_format, BySchema):
        forms.append({"json_schema": response_format.json_schema.schema_})
    if outputs is not None:
        named = {
            "json_schema": outputs.json_,
            "json_object": outputs.json_object or None,
            "regex": outputs.regex,
            "lark": outputs.grammar,
        }
        forms += [{key: value} for key, value in named.items() if value is not None]
    if len(forms) > 1:
        raise ApiError(
            400,
            "response_format, structured_outputs: expected one form of the answer, found "
            + ", ".join(next(iter(form)) for form in forms),
            code="invalid_value",
            param="response_format",
        )
    return Structure(**forms[0]) if forms else None
