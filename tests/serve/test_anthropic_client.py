"""Anthropic's own client against ``glm4export serve`` on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.helpers.demo import PROMPTS
from tests.helpers.served import CANCELLED, KEY, free, metric

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS: list[Any] = [
    {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    for prompt in PROMPTS
    if prompt["name"] == "tool_call"
    for function in [tool["function"] for tool in prompt["tools"]]
]
# This client has no argument for it, since Anthropic's newest models have no such field.
COMMON: dict[str, Any] = {"model": "demo", "max_tokens": 200, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as opened:
        yield opened


def text(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_chat_whole_and_streamed(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(messages=FRANCE, **COMMON)
    assert text(whole) == "The capital of France is Paris." and whole.stop_reason == "end_turn"
    with client.messages.stream(messages=FRANCE, **COMMON) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 2 and "".join(pieces) == text(final) == text(whole)
    assert final.stop_reason == "end_turn"

    def prompt(message: anthropic.types.Message) -> int:
        return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)

    counted = client.messages.count_tokens(model="demo", messages=FRANCE).input_tokens
    assert prompt(whole) == prompt(final) == counted > 5
    assert final.usage.output_tokens == whole.usage.output_tokens > 2


def test_tokens_that_were_cached(client: anthropic.Anthropic) -> None:
    long: list[Any] = [{"role": "user", "content": "Paris is a city. " * 40}]
    common = {**COMMON, "max_tokens": 2}
    first, again = (client.messages.create(messages=long, **common).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0 and again.cache_read_input_tokens
    assert again.cache_read_input_tokens >= 64
    assert again.input_tokens + again.cache_read_input_tokens == first.input_tokens


def test_thoughts_are_blocks(client: anthropic.Anthropic) -> None:
    prompt = next(prompt for prompt in PROMPTS if prompt["name"] == "think")
    system, *messages = prompt["messages"]
    assert system["role"] == "system"
    with client.messages.stream(system=system["content"], messages=messages, **COMMON) as stream:
        thinking, words = stream.get_final_message().content
    assert thinking.type == "thinking" and thinking.thinking == "Ones: 2 + 5 = 7. Tens: 1 + 1 + 0 = 2."
    assert words.type == "text" and words.text == "12 + 15 = 27."


def test_a_round_with_a_tool(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = client.messages.create(messages=messages, tools=TOOLS, **COMMON)
    assert first.stop_reason == "tool_use"
    [call] = first.content
    assert call.type == "tool_use" and call.input == {"city": "Paris"} and call.name == "get_weather"
    with client.messages.stream(messages=messages, tools=TOOLS, **COMMON) as stream:
        [streamed] = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input
    result = '{"city": "Paris", "condition": "sunny", "temperature": 21}'
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": result}]},
    ]
    second = client.messages.create(messages=messages, tools=TOOLS, **COMMON)
    assert text(second) == "It is sunny in Paris, 21 degrees." and second.stop_reason == "end_turn"


def test_its_tool_runner(client: anthropic.Anthropic) -> None:
    """It asks the server to remember the conversation, and goes on by itself where that is refused in its words."""
    [tool] = TOOLS

    def get_weather(city: str) -> str:
        return json.dumps({"city": city, "condition": "sunny", "temperature": 21})

    runner = client.beta.messages.tool_runner(
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[anthropic.beta_tool(get_weather, **tool)],
        **COMMON,
    )
    called, answered = list(runner)
    assert called.stop_reason == "tool_use" and answered.stop_reason == "end_turn"
    assert [block.text for block in answered.content if block.type == "text"] == ["It is sunny in Paris, 21 degrees."]


def test_what_the_client_has_read_goes_back(client: anthropic.Anthropic) -> None:
    """With fields of its own, of which some are null."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tools: list[Any] = [{"name": "choose", "input_schema": schema}]
    with client.messages.stream(messages=FRANCE, tools=tools, tool_choice={"type": "any"}, **COMMON) as stream:
        content = stream.get_final_message().content
    calls = [block.id for block in content if block.type == "tool_use"]
    results: list[Any] = [{"type": "tool_result", "tool_use_id": id, "content": "x"} for id in calls]
    assert results
    for given in (content, [block.model_dump() for block in content]):
        messages: list[Any] = [*FRANCE, {"role": "assistant", "content": given}, {"role": "user", "content": results}]
        assert client.messages.create(messages=messages, tools=tools, **COMMON).stop_reason


def test_a_call_that_must_come(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    message = client.messages.create(messages=FRANCE, tools=TOOLS, tool_choice=choice, **COMMON)
    [call] = message.content
    assert call.type == "tool_use" and isinstance(call.input, dict) and call.input.keys() == {"city"}


def test_json_of_a_schema_and_stop_sequences(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    config: Any = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    assert json.loads(text(client.messages.create(messages=FRANCE, output_config=config, **COMMON)))["city"]
    message = client.messages.create(messages=FRANCE, stop_sequences=[" is"], **COMMON)
    assert (text(message), message.stop_reason, message.stop_sequence) == (
        "The capital of France",
        "stop_sequence",
        " is",
    )


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="a slot holds 512") as raised:
        client.messages.create(messages=[{"role": "user", "content": "Hello! " * 600}], **COMMON)
    assert raised.value.body == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": raised.value.body["error"]["message"]},
    }  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError, match="there is no 'claude'; served: demo"):
        client.messages.create(messages=FRANCE, **{**COMMON, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="inference_geo: unknown field"):
        client.messages.create(messages=FRANCE, inference_geo="eu", **COMMON)
    with pytest.raises(anthropic.AuthenticationError, match="no key of this server's"):
        client.with_options(api_key="another").messages.create(messages=FRANCE, **COMMON)


def test_a_client_that_leaves(client: anthropic.Anthropic, url: str) -> None:
    """From the midst of an answer that its form makes long."""
    before = metric(url, CANCELLED)
    schema = {"type": "array", "minItems": 900, "items": {"type": "boolean"}}
    form: Any = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    with client.messages.stream(model="demo", max_tokens=1900, messages=FRANCE, extra_body=form) as stream:
        next(iter(stream))
    assert free(url) and metric(url, CANCELLED) == before + 1
