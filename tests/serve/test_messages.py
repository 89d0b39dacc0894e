"""Anthropic's API over a fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glm4runtime.engine.handle import RequestFailed
from glm4runtime.engine.request import Delta
from glm4runtime.text.answers import ToolCall
from glm4serve import Settings
from glm4serve.keys import Keys
from tests.helpers.asgi import ask, events
from tests.helpers.fake_engine import words
from tests.serve.conftest import Serve

PATH = "/v1/messages"
TURN: dict[str, Any] = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "m", "max_tokens": 50, "messages": [TURN]}
WEATHER: dict[str, Any] = {"name": "weather", "description": "The weather.", "input_schema": {"type": "object"}}
ANSWER = [
    Delta(thought="hm", tokens=(1,)),
    Delta(thought="m", tokens=(2,)),
    Delta(content="Let me ", tokens=(3,)),
    Delta(content="look", tokens=(4,)),
    Delta(tool_calls=(ToolCall("weather", {"city": "Köln"}),), tokens=(5,)),
    Delta(tool_calls=(ToolCall("weather", {"city": "Bonn"}),), finish_reason="tool_calls"),
]
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}


def together(stream: list[Any]) -> list[dict[str, Any]]:
    """Blocks put together, each begun, told and ended in its turn."""
    blocks: list[dict[str, Any]] = []
    going = False
    for told in stream:
        if told["type"] == "content_block_start":
            assert not going and told["index"] == len(blocks)
            going = True
            blocks.append(dict(told["content_block"]))
        elif told["type"] == "content_block_delta":
            assert going and told["index"] == len(blocks) - 1
            part = told["delta"]
            if part["type"] == "input_json_delta":
                assert blocks[-1]["input"] == {}
                blocks[-1]["input"] = json.loads(part["partial_json"])
            else:
                blocks[-1][part["type"].removesuffix("_delta")] += part[part["type"].removesuffix("_delta")]
        elif told["type"] == "content_block_stop":
            assert going and told["index"] == len(blocks) - 1
            going = False
    assert not going
    return blocks


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in block.items() if key != "id"} for block in blocks]


def test_whole_and_streamed_answers_are_the_same(serve: Serve) -> None:
    app, _ = serve(ANSWER)
    body = {**BODY, "tools": [WEATHER]}
    whole = ask(app, PATH, body).json()
    assert without_ids(whole["content"]) == [
        {"type": "thinking", "thinking": "hmm", "signature": ""},
        {"type": "text", "text": "Let me look"},
        {"type": "tool_use", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "name": "weather", "input": {"city": "Bonn"}},
    ]
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "tool_use")
    assert whole["usage"]["output_tokens"] == 5 and whole["usage"]["cache_read_input_tokens"] == 0

    response = ask(app, PATH, {**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    stream = events(response)
    assert names == [told["type"] for told in stream]
    assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
    start, ending = stream[0]["message"], stream[-2]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert without_ids(together(stream)) == without_ids(whole["content"])
    assert ending["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and ending["usage"] == whole["usage"]
    ids = [block["id"] for block in whole["content"] + together(stream) if "id" in block]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("answer", "asked", "ending"),
    [
        (words("a"), {}, ("end_turn", None)),
        (words("a", stop=151336), {}, ("end_turn", None)),
        (words("a", stop="END"), {"stop_sequences": ["END"]}, ("stop_sequence", "END")),
        (words("a", "b", reason="length"), {"max_tokens": 2}, ("max_tokens", None)),
        (words("a", "b", reason="length"), {"max_tokens": 9}, ("model_context_window_exceeded", None)),
    ],
)
def test_why_an_answer_ended(
    serve: Serve, answer: list[Delta], asked: dict[str, Any], ending: tuple[str, str | None], stream: bool
) -> None:
    app, _ = serve(answer)
    response = ask(app, PATH, {**BODY, **asked, "stream": stream})
    found = events(response)[-2]["delta"] if stream else response.json()
    assert (found["stop_reason"], found["stop_sequence"]) == ending


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("thinking", "variables", "shown"),
    [
        (None, {}, True),
        ({"type": "adaptive"}, {}, True),
        ({"type": "adaptive", "display": "omitted"}, {}, False),
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}, True),
        ({"type": "disabled"}, {"enable_thinking": False}, False),
    ],
)
def test_thoughts(
    serve: Serve, thinking: dict[str, Any] | None, variables: dict[str, Any], shown: bool, stream: bool
) -> None:
    app, engine = serve(ANSWER)
    body = {**BODY, "max_tokens": 2000, "stream": stream, **({"thinking": thinking} if thinking else {})}
    response = ask(app, PATH, body)
    blocks = together(events(response)) if stream else response.json()["content"]
    assert ("thinking" in [block["type"] for block in blocks]) == shown
    assert engine.requests[0].template_variables == variables


@pytest.mark.parametrize("stream", [True, False])
def test_one_call_where_no_parallel_ones_are_wanted(serve: Serve, stream: bool) -> None:
    app, _ = serve(ANSWER)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    response = ask(app, PATH, {**BODY, "tools": [WEATHER], "tool_choice": choice, "stream": stream})
    blocks = together(events(response)) if stream else response.json()["content"]
    assert [block["input"] for block in blocks if block["type"] == "tool_use"] == [{"city": "Köln"}]


def test_what_the_engine_is_asked(serve: Serve) -> None:
    app, engine = serve(words("x"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    mark = {"type": "ephemeral"}
    body = {
        **BODY,
        "system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind.", "cache_control": mark}],
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "stop_sequences": ["a", "b"],
        "metadata": {"user_id": "me"},
        "service_tier": "standard_only",
        "cache_control": {"type": "ephemeral", "ttl": "1h"},
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }
    assert ask(app, PATH, body).status_code == 200
    request = engine.requests[0]
    params = request.params
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p) == (50, 0, 5, 0.5)
    assert request.messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert list(request.stop) == ["a", "b"] and request.timeout == 600
    assert request.structure is not None and request.structure.json_schema == schema
    ask(app, PATH, {**BODY, "max_tokens": 99999})
    assert engine.requests[1].params.temperature == 1.0 and engine.requests[1].params.max_new_tokens == 512


def test_which_calls_must_come(serve: Serve) -> None:
    app, engine = serve(words("x"))
    single = {"type": "any", "disable_parallel_tool_use": True}
    for choice in ({"type": "any"}, single, {"type": "tool", "name": "weather"}, {"type": "auto"}, {"type": "none"}):
        assert ask(app, PATH, {**BODY, "tools": [WEATHER], "tool_choice": choice}).status_code == 200
    some, one, named, free, none = engine.requests
    assert some.structure is not None and some.structure.function is None and some.structure.parallel
    assert one.structure is not None and not one.structure.parallel
    assert named.structure is not None and named.structure.function == "weather"
    assert free.structure is None and free.tools is not None
    assert none.structure is None and none.tools is None


def test_a_conversation_goes_through_the_template(serve: Serve) -> None:
    """Results in the order of their calls, whatever the client's; old thoughts are left out."""
    app, engine = serve(words("x"))
    other = {**CALL, "id": "toolu_2", "input": {"city": "Bonn"}}
    thought = {"type": "thinking", "thinking": "SECRET", "signature": ""}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True}
    failed["content"] = [{"type": "text", "text": "no "}, {"type": "text", "text": "city"}]
    messages = [
        TURN,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me look"}, CALL, other]},
        {"role": "user", "content": [failed, RESULT, {"type": "text", "text": "And now?"}]},
    ]
    body = {**BODY, "system": "Be kind.", "messages": messages, "tools": [WEATHER]}
    assert ask(app, PATH, body).status_code == 200
    request = engine.requests[0]
    assert request.messages is not None
    prompt = engine.template.render(request.messages, request.tools)
    parts = ["Be kind.", "Hi", "Let me look", '"Köln"', '"Bonn"', "rain", "Error: no city", "And now?"]
    found = [prompt.index(part) for part in parts]
    assert found == sorted(found) and "SECRET" not in prompt
    counted = {key: value for key, value in body.items() if key != "max_tokens"}
    tokens = ask(app, f"{PATH}/count_tokens", counted).json()
    assert tokens == {"input_tokens": len(engine.tokenizer.encode(prompt))}


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://a.example/a.png"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 1}, "best_of: unknown field"),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"temperature": 1.5}, "temperature: "),
    ({"top_k": "1"}, "top_k: "),
    ({"stop_sequences": [""]}, "stop_sequences: one of them is empty"),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "tool", "content": "a"}]}, r"messages[0]: "),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content"),
    ({"messages": [{**TURN, "mood": 1}]}, "messages[0].mood: unknown field"),
    ({"messages": [TURN, {"role": "assistant", "content": "I"}]}, "messages: the last one is the assistant's"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0]: no call in front of it"),
    (
        {
            "messages": [
                {"role": "assistant", "content": [CALL]},
                {"role": "user", "content": [{"type": "text", "text": "a"}, RESULT]},
            ]
        },
        "messages[1].content[1]: tool results come in front",
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: "),
    ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tools have no function 'other'"),
    ({"tools": [WEATHER, WEATHER], "tool_choice": {"type": "any"}}, "'weather' is there twice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens: expected less than max_tokens"),
    ({"output_config": {"effort": "much"}}, "output_config.effort: "),
    (
        {"tools": [WEATHER], "output_config": {"format": {"type": "json_schema", "schema": {}}}},
        "output_config.format: goes with no tools",
    ),
    ({"service_tier": "priority"}, "service_tier: "),
    ({"messages": [{"role": "user", "content": "a " * 600}]}, "a slot holds 512"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(serve: Serve, change: dict[str, Any], message: str) -> None:
    app, engine = serve(words("x"))
    response = ask(app, PATH, {**BODY, **change})
    found = response.json()
    assert response.status_code == 400 and found["type"] == "error", found
    assert found["error"]["type"] == "invalid_request_error" and message in found["error"]["message"], found
    assert not engine.requests


def test_errors_have_anthropics_form(serve: Serve) -> None:
    """Those of the gate, of routes and of the engine; others' paths keep their own."""
    app, engine = serve(words("x"), Settings(keys=Keys({"k" * 20: "ann"}), body_limit=500), max_queue=0)
    key = {"x-api-key": "k" * 20}

    def kind(path: str = PATH, body: Any = BODY, headers: dict[str, str] = key) -> tuple[int, str]:
        response = ask(app, path, body, headers=headers)
        assert response.json()["type"] == "error" and response.json()["error"]["message"]
        return response.status_code, response.json()["error"]["type"]

    assert kind(headers={}) == (401, "authentication_error")
    assert kind(body={**BODY, "model": "claude"}) == (404, "not_found_error")
    assert kind(f"{PATH}/batches") == (404, "not_found_error")
    assert kind(body={**BODY, "system": "a" * 600}) == (413, "request_too_large")
    assert kind() == (429, "rate_limit_error")
    engine.healthy = False
    assert kind() == (503, "overloaded_error")
    assert "type" not in ask(app, "/v1/completions", {"prompt": "a"}, headers=key).json()


def test_failures_while_it_answers(serve: Serve) -> None:
    app, _ = serve(words("x"), error=RequestFailed("the request failed: a graph"))
    response = ask(app, PATH, BODY)
    assert response.status_code == 500 and response.json()["error"]["type"] == "api_error"
    last = events(ask(app, PATH, {**BODY, "stream": True}))[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "the model failed on this request"}}
    app, _ = serve(words("x", reason="timeout"))
    assert ask(app, PATH, BODY).json()["error"]["type"] == "timeout_error"
