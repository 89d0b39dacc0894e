"""Tensors of a language model in Triton: their names and types, a request out of them, and an answer as them.

Strings are UTF-8. What has no type in Triton is JSON in a string. Sampling parameters have their names and defaults
in :class:`glm4runtime.SamplingParams`; real numbers are float64 there and here, so that a seed gives the same answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from glm4runtime.contract import UserError, shown
from glm4runtime.engine import Delta, Request, Usage
from glm4runtime.sampling import SamplingParams
from glm4runtime.text.grammar import Structure, tool_structure


class Tensor(NamedTuple):
    """One of Triton's: its data type, and its length, -1 for any."""

    data_type: str
    length: int = 1


TEXT, NUMBER, REAL, SWITCH = Tensor("TYPE_STRING"), Tensor("TYPE_INT64"), Tensor("TYPE_FP64"), Tensor("TYPE_BOOL")
TEXTS, NUMBERS = Tensor("TYPE_STRING", -1), Tensor("TYPE_INT64", -1)

_OF_PARAMS = {
    "float": REAL,
    "int": NUMBER,
    "int | None": NUMBER,
    "Sequence[int]": NUMBERS,
    "Mapping[int, float]": TEXT,  # JSON
}
_PARAMS = {field.name: _OF_PARAMS[str(field.type)] for field in fields(SamplingParams)}
_OF_REQUEST = {"n": NUMBER, "best_of": NUMBER, "num_beams": NUMBER, "length_penalty": REAL, "logprobs": NUMBER,
               "lookup": NUMBER, "draft": NUMBER, "adapter": TEXT, "salt": TEXT}  # fmt: skip

#: All optional, but one of the first three must be given.
INPUTS: dict[str, Tensor] = {
    "text_input": TEXT,  # a prompt, taken as it is
    "input_ids": NUMBERS,  # the same as token ids
    "messages": TEXT,  # JSON: a conversation, for the chat template
    "tools": TEXT,  # JSON: OpenAI-style function descriptions
    "tool_choice": TEXT,  # auto, none, required, or JSON that names a function
    "template_variables": TEXT,  # JSON: what else the template reads
    "structure": TEXT,  # JSON: one of json_schema, json_object, regex, lark, see glm4runtime.text.grammar.Structure
    "stop": TEXTS,
    "stop_token_ids": NUMBERS,
    "stream": SWITCH,  # responses as tokens come; otherwise one for each answer
    **_OF_REQUEST,
    **_PARAMS,
}

#: Each in every response; texts, calls and ids are what is new in the answer of this index.
OUTPUTS: dict[str, Tensor] = {
    "text_output": TEXT,
    "thought": TEXT,
    "tool_calls": TEXT,  # JSON: a list of {"name": …, "arguments": {…}}
    "token_ids": NUMBERS,
    "logprobs": TEXT,  # JSON: a list of {"token": …, "logprob": …, "top": [[id, logprob], …]}; empty if not asked for
    "index": NUMBER,
    "finish_reason": TEXT,  # empty until the answer's last response
    "prompt_tokens": NUMBER,
    "cached_tokens": NUMBER,
    "completion_tokens": NUMBER,  # so far, of all answers
}


@dataclass(frozen=True)
class Asked:
    """What a client wants."""

    request: Request
    stream: bool


def read_request(tensors: Mapping[str, np.ndarray], timeout: float | None = None) -> Asked:
    """A request out of :data:`INPUTS`' tensors. timeout: seconds.

    Raises UserError naming the tensor that is wrong, and what ``Request`` and ``SamplingParams`` raise.
    """
    given = {name: _value(name, array) for name, array in tensors.items()}
    stream = given.pop("stream", False)
    if "input_ids" in given and "text_input" in given:
        raise UserError("input_ids: expected either text_input, input_ids or messages, found two of them")
    if not given.keys() & {"text_input", "input_ids", "messages"}:
        raise UserError("expected one of the inputs text_input, input_ids and messages, found none of them")
    asked: dict[str, Any] = {name: given[name] for name in _OF_REQUEST if name in given}
    params = {name: given[name] for name in _PARAMS if name in given}
    if "logit_bias" in params:
        params["logit_bias"] = _biases(_json("logit_bias", params["logit_bias"], dict))
    for name, kind in (("messages", list), ("tools", list), ("template_variables", dict)):
        if name in given:
            asked[name] = _json(name, given[name], kind)
    structure = _structure(_json("structure", given["structure"], dict)) if "structure" in given else None
    choice = given.get("tool_choice")
    if choice is not None:
        called = _called(asked.get("tools"), choice)
        if called is not None and structure is not None:
            raise UserError("structure: an answer in this form can't be a call, which tool_choice asks for")
        structure = called or structure
        if choice == "none":
            asked.pop("tools", None)
    request = Request(
        prompt=given.get("input_ids", given.get("text_input")),
        params=SamplingParams(**params),
        stop=[*given.get("stop", ()), *given.get("stop_token_ids", ())],
        structure=structure,
        timeout=timeout,
        **asked,
    )
    return Asked(request, stream)


def response_tensors(delta: Delta, usage: Usage) -> dict[str, np.ndarray]:
    """The same the other way: :data:`OUTPUTS`' tensors."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in delta.tool_calls]
    logprobs = [{"token": item.token, "logprob": item.logprob, "top": item.top} for item in delta.logprobs]
    values: dict[str, Any] = {
        "text_output": delta.content,
        "thought": delta.thought,
        "tool_calls": json.dumps(calls, ensure_ascii=False),
        "token_ids": delta.tokens,
        "logprobs": json.dumps(logprobs),
        "index": delta.choice,
        "finish_reason": delta.finish_reason or "",
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    return {name: _array(values[name], tensor) for name, tensor in OUTPUTS.items()}


def _array(value: Any, tensor: Tensor) -> np.ndarray:
    if tensor == TEXT:
        return np.array([value.encode(errors="replace")], dtype=np.object_)
    return np.array(value, dtype=np.int64).reshape(tensor.length)


def _value(name: str, array: np.ndarray) -> Any:
    """A tensor's value, or its values. Raises UserError."""
    tensor = INPUTS.get(name)
    if tensor is None:
        raise UserError(f"{name}: no such input; they are {', '.join(INPUTS)}")
    values = array.reshape(-1).tolist()
    if tensor.data_type == "TYPE_STRING":
        values = [_text(name, value) for value in values]
    if tensor.length == -1:
        return values
    if len(values) != 1:
        raise UserError(f"{name}: expected one value, found {len(values)}")
    return values[0]


def _text(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: expected UTF-8, found another byte at {error.start}") from None


def _json(name: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{name}: expected a JSON {_KINDS[kind]}, found {shown(value)}")
    return value


_KINDS: dict[type, str] = {list: "list", dict: "object"}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _biases(given: Mapping[str, Any]) -> dict[int, Any]:
    for key in given:
        if not key.isdecimal() or len(key) > 10:
            raise UserError(f"logit_bias: expected token ids as keys, found {shown(key)}")
    return {int(key): value for key, value in given.items()}


def _structure(given: Mapping[str, Any]) -> Structure:
    known = ("json_schema", "json_object", "regex", "lark")
    if unknown := sorted(given.keys() - set(known)):
        raise UserError(f"structure: expected one of {', '.join(known)}, found {shown(unknown[0])}")
    return Structure(**given)


def _called(tools: Any, choice: str) -> Structure | None:
    value = _json("tool_choice", choice, dict) if choice.lstrip().startswith("{") else choice
    if value not in ("auto", "none") and not tools:
        raise UserError("tool_choice: there are no tools")
    return tool_structure(tools or (), value)
