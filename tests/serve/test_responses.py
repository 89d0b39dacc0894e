"""``/v1/responses`` over a fake engine, then by OpenAI's own client on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from glm4runtime.engine.handle import RequestFailed
from glm4runtime.engine.request import Delta
from glm4runtime.text.answers import ToolCall
from tests.helpers.asgi import ask, events
from tests.helpers.demo import PROMPTS
from tests.helpers.fake_engine import words
from tests.helpers.served import CANCELLED, KEY, free, metric
from tests.serve.conftest import Serve

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "m", "input": "Hi"}
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
ANSWER = [
    Delta(thought="hm", tokens=(1,)),
    Delta(thought="m", tokens=(2,)),
    Delta(content="Let me ", tokens=(3,)),
    Delta(content="look", tokens=(4,)),
    Delta(tool_calls=(ToolCall("weather", {"city": "Köln"}),), tokens=(5,)),
    Delta(tool_calls=(ToolCall("weather", {"city": "Bonn"}),), finish_reason="tool_calls"),
]
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Köln"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "rain"}


def without_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        gone = ("id", "call_id", "created_at")
        return {key: without_ids(item) for key, item in value.items() if key not in gone}
    return value


def test_whole_and_streamed_answers_are_the_same(serve: Serve) -> None:
    app, engine = serve(ANSWER)
    body = {**BODY, "tools": [WEATHER], "instructions": "Be kind.", "metadata": {"a": "b"}, "max_output_tokens": 50}
    whole = ask(app, PATH, body).json()
    reasoning, message, first, second = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hmm"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "Let me look" and message["role"] == "assistant"
    assert [first["arguments"], second["arguments"]] == ['{"city": "Köln"}', '{"city": "Bonn"}']
    assert (whole["status"], whole["store"], whole["instructions"]) == ("completed", False, "Be kind.")
    assert whole["metadata"] == {"a": "b"} and whole["tools"][0]["name"] == "weather"
    assert whole["usage"]["output_tokens"] == 5
    thought = len(engine.tokenizer.encode("hmm"))
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": thought}

    response = ask(app, PATH, {**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    stream = events(response)
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == [told["type"] for told in stream]
    assert [told["sequence_number"] for told in stream] == list(range(len(stream)))
    assert names[:2] == ["response.created", "response.in_progress"] and stream[0]["response"]["output"] == []
    assert names[-1] == "response.completed"
    assert without_ids(stream[-1]["response"]) == without_ids(whole)
    done = [told["item"] for told in stream if told["type"] == "response.output_item.done"]
    added = [told for told in stream if told["type"] == "response.output_item.added"]
    assert done == stream[-1]["response"]["output"] and [told["output_index"] for told in added] == [0, 1, 2, 3]
    for told in stream:
        if "item_id" in told:
            assert told["item_id"] == done[told["output_index"]]["id"]
    for index, item in enumerate(done):
        pieces = [told["delta"] for told in stream if told.get("output_index") == index and "delta" in told]
        whole_text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(pieces) == whole_text


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_are_cut(serve: Serve, stream: bool) -> None:
    app, _ = serve(words("a", "b", reason="length"))
    response = ask(app, PATH, {**BODY, "stream": stream})
    found = events(response)[-1]["response"] if stream else response.json()
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete" and found["output"][0]["content"][0]["text"] == "ab"


@pytest.mark.parametrize("stream", [True, False])
def test_one_call_where_no_parallel_ones_are_wanted(serve: Serve, stream: bool) -> None:
    app, _ = serve(ANSWER)
    body = {**BODY, "tools": [WEATHER], "parallel_tool_calls": False, "stream": stream}
    response = ask(app, PATH, body)
    found = events(response)[-1]["response"] if stream else response.json()
    assert [item["type"] for item in found["output"]] == ["reasoning", "message", "function_call"]


def test_what_the_engine_is_asked(serve: Serve) -> None:
    app, engine = serve(words("x"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    body = {
        **BODY,
        "max_output_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "text": {"format": form},
        "reasoning": {"effort": "none"},
        "store": False,
        "truncation": "disabled",
        "background": False,
        "include": [],
        "user": "me",
    }
    answer = ask(app, PATH, body)
    assert answer.status_code == 200 and answer.json()["text"] == {"format": form}
    request = engine.requests[0]
    assert (request.params.max_new_tokens, request.params.temperature, request.params.top_p) == (7, 0, 0.5)
    assert request.structure is not None and request.structure.json_schema == schema
    assert request.template_variables == {"enable_thinking": False}
    choices: list[Any] = ["required", {"type": "function", "name": "weather"}, "auto", "none"]
    for choice in choices:
        assert ask(app, PATH, {**BODY, "tools": [WEATHER], "tool_choice": choice}).status_code == 200
    some, named, free, none = engine.requests[1:]
    assert some.structure is not None and named.structure is not None and named.structure.function == "weather"
    assert free.structure is None and free.tools is not None and none.tools is None
    assert free.params.temperature == 1.0 and free.params.max_new_tokens == 512


def test_a_conversation_goes_through_the_template(serve: Serve) -> None:
    """With our own answer's items sent back; results in the order of their calls."""
    app, engine = serve(ANSWER)
    answer = ask(app, PATH, {**BODY, "tools": [WEATHER]}).json()
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": f"rain {number}"}
        for number, call in enumerate(calls)
    ]
    parts = [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "kind."}]
    given = [{"role": "developer", "content": parts}, {"role": "user", "content": "Hi"}, *answer["output"]]
    given += [*reversed(results), {"type": "message", "role": "user", "content": "And now?"}]
    assert ask(app, PATH, {"input": given, "tools": [WEATHER]}).status_code == 200
    request = engine.requests[1]
    assert request.messages is not None
    prompt = engine.template.render(request.messages, request.tools)
    shown = ["Be kind.", "Hi", "Let me look", "Köln", "Bonn", "rain 0", "rain 1", "And now?"]
    found = [prompt.index(part) for part in shown]
    assert found == sorted(found) and "hmm" not in prompt


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 1}, "unknown_parameter", "best_of"),
    ({"store": True}, "invalid_value", "store"),
    ({"previous_response_id": "resp_1"}, "invalid_value", "previous_response_id"),
    ({"conversation": "conv_1"}, "unknown_parameter", "conversation"),
    ({"background": True}, "invalid_value", "background"),
    ({"truncation": "auto"}, "invalid_value", "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "invalid_value", "include[0]"),
    ({"reasoning": {"effort": "high"}}, "invalid_value", "reasoning.effort"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": [{"role": "user", "content": "a", "mood": 1}]}, "unknown_parameter", "input[0].mood"),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "invalid_value", "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "invalid_value", "input[0].content"),
    ({"input": [RESULT]}, "invalid_value", "input[0].call_id"),
    ({"input": [1]}, "invalid_value", "input[0]"),
    ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}, "invalid_value", "text.format"),
    ({"text": {"verbosity": "low"}}, "unknown_parameter", "text.verbosity"),
    ({"stream_options": {}}, "invalid_value", "stream_options"),
    ({"input": "a " * 600}, "context_length_exceeded", "input"),
]


@pytest.mark.parametrize(("change", "code", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(serve: Serve, change: dict[str, Any], code: str, param: str) -> None:
    app, engine = serve(words("x"))
    response = ask(app, PATH, {**BODY, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and (error["code"], error["param"]) == (code, param), error
    assert not engine.requests


def test_failures_while_it_answers(serve: Serve) -> None:
    app, _ = serve(words("x"), error=RequestFailed("the request failed: a graph"))
    assert ask(app, PATH, BODY).status_code == 500
    told, failed = events(ask(app, PATH, {**BODY, "stream": True}))[-2:]
    assert (told["type"], told["code"], told["message"]) == (
        "error",
        "request_failed",
        "the model failed on this request",
    )
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the model failed on this request"}


FRANCE = "What is the capital of France?"
TOOLS: list[Any] = [
    {"type": "function", **tool["function"], "strict": False}
    for prompt in PROMPTS
    if prompt["name"] == "tool_call"
    for tool in prompt["tools"]
]
COMMON: dict[str, Any] = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def test_openais_client(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=FRANCE, **COMMON)
    assert whole.output_text == "The capital of France is Paris." and whole.status == "completed"
    pieces = []
    with client.responses.stream(input=FRANCE, **COMMON) as stream:
        for told in stream:
            if told.type == "response.output_text.delta":
                pieces.append(told.delta)
        final = stream.get_final_response()
    assert len(pieces) > 2 and "".join(pieces) == final.output_text == whole.output_text
    assert final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens > 10
    think: list[Any] = next(prompt["messages"] for prompt in PROMPTS if prompt["name"] == "think")
    with client.responses.stream(input=think, **COMMON) as stream:
        reasoning, words = stream.get_final_response().output
    assert reasoning.type == "reasoning" and reasoning.content
    assert reasoning.content[0].text == "Ones: 2 + 5 = 7. Tens: 1 + 1 + 0 = 2."
    assert words.type == "message"


def test_a_round_with_a_tool(client: openai.OpenAI) -> None:
    given: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    [call] = client.responses.create(input=given, tools=TOOLS, **COMMON).output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
    with client.responses.stream(input=given, tools=TOOLS, **COMMON) as stream:
        [streamed] = stream.get_final_response().output
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    result = '{"city": "Paris", "condition": "sunny", "temperature": 21}'
    given += [call, {"type": "function_call_output", "call_id": call.call_id, "output": result}]
    second = client.responses.create(input=given, tools=TOOLS, **COMMON)
    assert second.output_text == "It is sunny in Paris, 21 degrees."


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}}
    schema |= {"required": ["city"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    assert json.loads(client.responses.create(input=FRANCE, text=form, **COMMON).output_text)["city"]


def test_memory_is_refused_and_a_client_may_leave(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="store: "):
        client.responses.create(input=FRANCE, store=True, **COMMON)
    with pytest.raises(openai.BadRequestError, match="previous_response_id: "):
        client.responses.create(input=FRANCE, previous_response_id="resp_1", **COMMON)
    before = metric(url, CANCELLED)
    schema = {"type": "array", "minItems": 900, "items": {"type": "boolean"}}  # no answer that is over at once
    form: Any = {"format": {"type": "json_schema", "name": "long", "schema": schema}}
    with client.responses.create(input="Write on.", text=form, model="demo", stream=True) as stream:
        next(iter(stream))
    assert free(url) and metric(url, CANCELLED) == before + 1
