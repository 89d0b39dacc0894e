from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from glm4runtime.engine.handle import RequestFailed
from glm4runtime.engine.request import Delta
from glm4runtime.sampling.logprobs import TokenLogprobs
from glm4runtime.text.answers import ToolCall
from glm4serve.openai.chat_answer import ChatAnswer
from tests.helpers.asgi import ASK, CHAT, ask, events
from tests.helpers.fake_engine import words
from tests.serve.conftest import Serve

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}},
}
ANSWER = [
    Delta(thought="hm", tokens=(1,)),
    Delta(thought="m", tokens=(2,)),
    Delta(tokens=(3,)),  # held back
    Delta(content="Let me ", tokens=(4,)),
    Delta(content="look", tokens=(5,)),
    Delta(tool_calls=(ToolCall("weather", {"city": "Köln"}),), tokens=(6,)),
    Delta(tool_calls=(ToolCall("weather", {"city": "Bonn"}),), finish_reason="tool_calls"),
]


def together(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """A choice's message put together as OpenAI's client does."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            message["content"] += choice["delta"].get("content", "")
            message["reasoning_content"] += choice["delta"].get("reasoning_content", "")
            for call in choice["delta"].get("tool_calls", ()):
                assert call["index"] == len(message["tool_calls"])  # whole, in their order
                message["tool_calls"][call["id"]] = call["function"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def test_a_whole_answer_is_written_beside_the_event_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With log-probabilities of many tokens that takes seconds, in which others are answered."""
    app, _ = serve(ANSWER)
    threads, whole = [], ChatAnswer.whole

    def noted(self: ChatAnswer, results: Any) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return whole(self, results)

    monkeypatch.setattr(ChatAnswer, "whole", noted)
    assert ask(app, CHAT, {**ASK, "tools": [WEATHER]}).status_code == 200
    assert threads and threading.main_thread() not in threads  # where the test's loop is


def test_whole_and_streamed_answers_are_the_same(serve: Serve) -> None:
    app, _ = serve(ANSWER)
    body = {**ASK, "tools": [WEATHER]}
    whole = ask(app, CHAT, body).json()
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me look", "hmm")
    calls = [call["function"] for call in message["tool_calls"]]
    assert calls == [
        {"name": "weather", "arguments": '{"city": "Köln"}'},
        {"name": "weather", "arguments": '{"city": "Bonn"}'},
    ]
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert whole["usage"]["completion_tokens"] == 6

    response = ask(app, CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, usage, done = events(response)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["id"] == usage["id"] for chunk in chunks)
    streamed = together(chunks)
    assert [*streamed["tool_calls"].values()] == calls
    assert (streamed["content"], streamed["reasoning_content"]) == ("Let me look", "hmm")
    assert streamed["finish_reason"] == "tool_calls"
    assert len({*streamed["tool_calls"]} | {call["id"] for call in message["tool_calls"]}) == 4


def test_several_choices(serve: Serve) -> None:
    app, _ = serve(words("a", "b"))
    assert [choice["message"]["content"] for choice in ask(app, CHAT, {**ASK, "n": 2}).json()["choices"]] == ["ab"] * 2
    chunks = events(ask(app, CHAT, {**ASK, "n": 2, "stream": True}))[:-1]
    assert [together(chunks, index)["content"] for index in (0, 1)] == ["ab", "ab"]


def test_one_call_where_no_parallel_ones_are_wanted(serve: Serve) -> None:
    app, _ = serve(ANSWER)
    body = {**ASK, "tools": [WEATHER], "parallel_tool_calls": False}
    assert len(ask(app, CHAT, body).json()["choices"][0]["message"]["tool_calls"]) == 1
    assert len(together(events(ask(app, CHAT, {**body, "stream": True}))[:-1])["tool_calls"]) == 1


def test_half_characters_in_log_probabilities(serve: Serve) -> None:
    """The text of a half is its bytes; the bytes of all tokens are the answer's."""
    app, engine = serve()
    ids = engine.tokenizer.encode("é")
    assert len(ids) == 2
    scored = [TokenLogprobs(id, -0.25, ((id, -0.25), (5, float("-inf")))) for id in ids]
    script = [
        Delta(tokens=(ids[0],), logprobs=(scored[0],)),
        Delta(content="é", tokens=(ids[1],), logprobs=(scored[1],)),
        Delta(finish_reason="stop"),
    ]
    app, _ = serve(script)
    body = {**ASK, "logprobs": True, "top_logprobs": 2}
    whole = ask(app, CHAT, body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in whole] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert b"".join(bytes(entry["bytes"]) for entry in whole).decode() == "é"
    assert whole[0]["top_logprobs"][1]["logprob"] == -9999.0
    chunks = events(ask(app, CHAT, {**body, "stream": True}))[:-1]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in streamed if part for entry in part["content"]] == whole


def test_what_the_engine_is_asked(serve: Serve) -> None:
    app, engine = serve(words("x"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = {
        **ASK,
        "max_completion_tokens": 7,
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "typical_p": 0.9,
        "xtc_probability": 0.5,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "min_tokens": 2,
        "seed": -1,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "logit_bias": {"17": -100},
        "cache_salt": "mine",
        "logprobs": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
        "chat_template_kwargs": {"enable_thinking": False},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
    }
    assert ask(app, CHAT, body).status_code == 200
    request = engine.requests[0]
    params = request.params
    assert params.max_new_tokens == 7 and params.temperature == 0 and params.top_p == 0.5 and params.top_k == 0
    assert params.min_p == 0.1 and params.typical_p == 0.9 and params.xtc_probability == 0.5
    assert params.repetition_penalty == 1.1 and params.presence_penalty == -1 and params.frequency_penalty == 0.5
    assert params.min_new_tokens == 2 and params.seed == 2**63 - 1 and params.logit_bias == {17: -100.0}
    assert list(request.stop) == ["a", "b", 3]
    assert request.salt == "mine" and request.logprobs == 0 and request.timeout == 600
    assert request.structure is not None and request.structure.json_schema == schema
    assert request.template_variables == {"enable_thinking": False}
    ask(app, CHAT, ASK)
    assert engine.requests[1].params.temperature == 1.0 and engine.requests[1].params.max_new_tokens == 512


def test_which_calls_must_come(serve: Serve) -> None:
    app, engine = serve(words("x"))
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named, "auto", "none"):
        assert ask(app, CHAT, {**ASK, "tools": [WEATHER], "tool_choice": choice}).status_code == 200
    required, only, auto, none = engine.requests
    assert required.structure is not None and required.structure.function is None and required.structure.parallel
    assert only.structure is not None and only.structure.function == "weather"
    assert auto.structure is None and auto.tools is not None
    assert none.structure is None and none.tools is None


def test_a_round_with_a_tool_goes_through_the_template(serve: Serve) -> None:
    """With what OpenAI's client sends back of our own answer."""
    app, _ = serve(ANSWER)
    answer = ask(app, CHAT, {**ASK, "tools": [WEATHER]}).json()["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"rain {at}"}
        for at, call in enumerate(answer["tool_calls"])
    ]
    messages = [{"role": "developer", "content": "Be kind."}, *ASK["messages"], answer, *results]
    assert ask(app, CHAT, {"messages": messages, "tools": [WEATHER]}).status_code == 200
    prompt = ask(app, "/apply-template", {"messages": messages, "tools": [WEATHER]}).json()["prompt"]
    assert prompt.index("Be kind.") < prompt.index("Bonn") < prompt.index("rain 0") < prompt.index("rain 1")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"best_off": 1}, "unknown_parameter", "best_off"),
    ({"store": True}, "invalid_value", "store"),
    ({"service_tier": "flex"}, "invalid_value", "service_tier"),
    ({"temperature": "1"}, "invalid_value", "temperature"),
    ({"temperature": float("inf")}, "invalid_json", ""),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"n": 65}, "invalid_value", "n"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": ["a"] * 17}, "invalid_value", "stop"),
    ({"top_logprobs": 1}, "invalid_value", "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "invalid_value", ""),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "invalid_value", "messages[0]"),
    ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "unknown_parameter", "messages[0].mood"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [WEATHER, WEATHER], "tool_choice": "required"}, "invalid_value", ""),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "invalid_value",
        "",
    ),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "invalid_value", "response_format"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "invalid_value",
        "response_format",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
    ({"model": "other"}, "model_not_found", "model"),
    ({"messages": [{"role": "user", "content": "a " * 600}]}, "context_length_exceeded", "messages"),
]


@pytest.mark.parametrize(("change", "code", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(serve: Serve, change: dict[str, Any], code: str, param: str) -> None:
    app, engine = serve(words("x"))
    body = json.dumps({**ASK, **change}).encode()
    response = ask(app, CHAT, body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400), error
    assert (error["code"], error["param"] or "") == (code, param), error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert not engine.requests


def test_failures_of_the_engine(serve: Serve) -> None:
    app, _ = serve(words("x"), error=RequestFailed("the request failed: a graph"))
    response = ask(app, CHAT, ASK)
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    stream = ask(app, CHAT, {**ASK, "stream": True})
    assert stream.status_code == 200 and events(stream)[-1]["error"]["code"] == "request_failed"
    app, engine = serve(words("x"), error=ValueError("of /secret/path"))
    response = ask(app, CHAT, ASK)
    assert response.status_code == 500 and "secret" not in response.text
    engine.healthy = False
    assert ask(app, CHAT, ASK).status_code == 503


def test_answers_that_ran_out_of_time(serve: Serve) -> None:
    app, _ = serve(words("x", reason="timeout"))
    late = ask(app, CHAT, ASK)
    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"  # the official clients' header
    assert events(ask(app, CHAT, {**ASK, "stream": True}))[-1]["error"]["code"] == "timeout"
