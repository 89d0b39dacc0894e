"""What common clients send, as they were seen to send it: nothing that changes no answer may keep them out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glm4runtime.engine.request import Delta
from glm4runtime.text.answers import ToolCall
from tests.helpers.asgi import ASK, CHAT, ask, events
from tests.helpers.fake_engine import words
from tests.serve.conftest import Serve

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
CACHED: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
BASH = {"name": "mcp__" + "a" * 90 + "__run", "description": "Run it.", "input_schema": {"type": "object"}}

# Claude Code 2.1.197, texts shortened
CLAUDE_CODE: dict[str, Any] = {
    "model": "m",
    "max_tokens": 32000,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral", "scope": "global"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "text", "text": "hi", **CACHED}]},
        {"role": "system", "content": "Available agents: none."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": BASH["name"], "input": {"command": "echo hello"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "hello", "is_error": False, **CACHED}
            ],
        },
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}], "output_config": {"effort": "low"}},
    ],
    "tools": [{**BASH, "eager_input_streaming": True, "defer_loading": False}],
    "metadata": {"user_id": '{"device_id":"1"}'},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}


def test_claude_code(serve: Serve) -> None:
    app, engine = serve(words("Done", "."))
    assert ask(app, "/", method="HEAD").status_code == 200  # what it does first
    response = ask(app, f"{MESSAGES}?beta=true", CLAUDE_CODE)
    assert response.status_code == 200 and events(response)[-1]["type"] == "message_stop", response.text
    assert response.headers["request-id"] == response.headers["x-request-id"]
    [request] = engine.requests
    assert request.messages is not None and request.structure is None
    prompt = engine.template.render(request.messages, request.tools)
    for text in ("You are an agent.", "Available agents: none.", "Be brief.", "Look.hi", "echo hello", BASH["name"]):
        assert prompt.count(text) >= 1, text
    counted = {key: CLAUDE_CODE[key] for key in ("model", "messages", "system", "tools", "context_management")}
    assert ask(app, f"{MESSAGES}/count_tokens?beta=true", counted).json() == {
        "input_tokens": len(engine.tokenizer.encode(prompt))
    }
    counted["messages"] = CLAUDE_CODE["messages"][:3]  # what was said so far
    assert ask(app, f"{MESSAGES}/count_tokens", counted).json()["input_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "some"}]}},
            "context_management.edits[0].keep",
        ),
        ({"tools": [{**BASH, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"output_config": {"effort": "high", "task_budget": {}}}, "output_config.task_budget: unknown field"),
        (
            {"messages": [ASK["messages"][0], {"role": "system", "content": "a", "clear_at": "next_user_message"}]},
            "messages[1].clear_at",
        ),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages: there is none of the user's"),
    ],
)
def test_what_would_change_claude_codes_answer(serve: Serve, change: dict[str, Any], told: str) -> None:
    app, engine = serve(words("x"))
    response = ask(app, MESSAGES, {**CLAUDE_CODE, **change})
    assert response.status_code == 400 and told in response.json()["error"]["message"], response.text
    assert not engine.requests


def test_threads_are_refused_in_words_that_anthropics_client_knows(serve: Serve) -> None:
    app, engine = serve(words("x"))
    body = {**ASK, "max_tokens": 9, "thread": {"type": "create"}}
    response = ask(app, MESSAGES, body)
    assert response.status_code == 400 and not engine.requests
    assert response.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
    assert "details" not in ask(app, MESSAGES, {**body, "thread": None, "mood": 1}).json()["error"]


def test_codex(serve: Serve) -> None:
    """Its second request, behind a thought and a call (parsed by OpenAI's client). So LiteLLM asks for Anthropic's."""
    app, engine = serve(words("Done"))
    item = {"type": "message", "id": "msg_1"}
    body = {
        "model": "m",
        "stream": True,
        "store": False,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2",
        "client_metadata": {"x-codex-installation-id": "1"},
        "tools": [{"type": "function", "name": "exec_command", "description": "d", "parameters": {}, "strict": False}],
        "input": [
            {**item, "role": "developer", "content": [{"type": "input_text", "text": "You are an agent."}]},
            {**item, "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "hm"}],
                "encrypted_content": None,
            },
            {**item, "role": "assistant", "content": [{"type": "output_text", "text": "{}", "parsed": {}}]},
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "exec_command",
                "arguments": "{}",
                "parsed_arguments": {},
            },
            {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "hello"},
        ],
    }
    response = ask(app, RESPONSES, body)
    assert response.status_code == 200 and events(response)[-1]["type"] == "response.completed", response.text
    assert engine.requests[0].messages is not None and engine.requests[0].messages[-1]["content"] == "hello"
    reference = {**body, "input": [{"type": "item_reference", "id": "rs_1"}]}  # the AI SDK's, unless store is false
    told = ask(app, RESPONSES, reference).json()["error"]["message"]
    assert told.startswith("input[0]: expected one of 'message', ") and told.endswith(", found 'item_reference'")


CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PARSED = {**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {}}}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"content": "{}", "parsed": {"a": 1}}, {"content": "{}"}),
        ({"content": None, "tool_calls": [PARSED], "parsed": None}, {"content": "", "tool_calls": [CALL]}),
        ({"content": "a", "provider_specific_fields": {"refusal": None}}, {"content": "a"}),
        ({"content": "a", "thinking_blocks": [{"type": "thinking", "thinking": "SECRET"}]}, {"content": "a"}),
        ({"content": "a", "reasoning": "SECRET", "reasoning_details": [{"text": "SECRET"}]}, {"content": "a"}),
        ({"content": "a", "mood": None, "function_call": None}, {"content": "a"}),
        ({"content": [{"type": "text", "text": "a", **CACHED}]}, {"content": [{"type": "text", "text": "a"}]}),
    ],
    ids=["parsed", "parsed_arguments", "litellm", "thinking_blocks", "reasoning", "nulls", "cache_control"],
)
def test_answers_that_clients_keep_things_beside(serve: Serve, given: dict[str, Any], plain: dict[str, Any]) -> None:
    """OpenAI's own, after ``parse`` and ``stream``, among them."""
    app, engine = serve(words("x"))
    messages = [*ASK["messages"], {"role": "assistant", **given}, {"role": "user", "content": "And?"}]
    response = ask(app, CHAT, {"messages": messages})
    assert response.status_code == 200, response.text
    assert engine.requests[0].messages is not None and engine.requests[0].messages[1] == {"role": "assistant", **plain}


def test_fields_that_change_nothing(serve: Serve) -> None:
    """Null is what many clients write of a field that nobody has set."""
    app, engine = serve(words("x"))
    nothing = {"functions": None, "reasoning_effort": None, "prediction": None, "verbosity": None, "num_ctx": None}
    body = {**ASK, **nothing, "service_tier": "default", "prompt_cache_retention": "24h"}
    assert ask(app, CHAT, {**body, "stream_options": {"include_usage": None}, "stream": True}).status_code == 200
    said = {"type": None, "role": "user", "content": "a"}
    assert ask(app, RESPONSES, {"input": [said]}).status_code == 200
    assert ask(app, "/v1/completions", {"prompt": "a", "suffix": None}).status_code == 200
    assert len(engine.requests) == 3
    assert ask(app, CHAT, {**ASK, "reasoning_effort": "high"}).json()["error"]["param"] == "reasoning_effort"
    assert ask(app, CHAT, {"messages": None}).json()["error"]["param"] == "messages"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", RESPONSES, MESSAGES])
def test_events_are_one_line_to_every_reader(serve: Serve, path: str) -> None:
    """httpx and requests, which clients read streams with, end lines at more than JSON's writers take care of."""
    text = "a\u2028b\u2029c\x85d\x0be"
    app, _ = serve([Delta(content=text, tokens=(1,)), Delta(tool_calls=(ToolCall("f", {"a": text}),)), *words("z")])
    bodies: dict[str, Any] = {
        CHAT: ASK,
        "/v1/completions": {"prompt": "a"},
        RESPONSES: {"input": "a"},
        MESSAGES: {**ASK, "max_tokens": 9},
    }
    response = ask(app, path, {**bodies[path], "stream": True})
    for line in response.text.splitlines():
        if line not in ("", "data: [DONE]") and not line.startswith("event: "):
            assert json.loads(line.removeprefix("data: "))
    assert any(text in piece for piece in _texts(events(response)))


def _texts(value: Any) -> list[str]:
    """All texts in it."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def test_prompts_that_are_too_long(serve: Serve) -> None:
    """In the words by which clients know that they have to shorten a conversation."""
    app, engine = serve(words("x"))
    long = {"messages": [{"role": "user", "content": "a " * 600}]}
    for path, body in ((CHAT, long), (MESSAGES, {**long, "max_tokens": 9})):
        response = ask(app, path, body)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("prompt is too long: "), response.text
        assert f" tokens > {engine.max_seq_len} maximum" in response.text
