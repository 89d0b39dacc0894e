"""OpenAI's own client against ``glm4export serve`` on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from glm4runtime import Session
from glm4runtime.scoring import log_probabilities
from tests.helpers.demo import PROMPTS
from tests.helpers.served import CANCELLED, KEY, free, metric

TOOLS: list[Any] = next(prompt["tools"] for prompt in PROMPTS if prompt["name"] == "tool_call")
FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def test_what_the_model_was_trained_to_say_whole_and_streamed_many_at_once(client: openai.OpenAI) -> None:
    chosen = [prompt for prompt in PROMPTS if not prompt.get("tools")][:12]

    def asked(prompt: dict[str, Any]) -> tuple[str, str]:
        common: dict[str, Any] = {"model": "demo", "messages": prompt["messages"], "temperature": 0}
        whole = client.chat.completions.create(**common)
        chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage == whole.usage and whole.usage is not None and whole.usage.completion_tokens > 1
        streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert whole.choices[0].finish_reason == "stop"
        return whole.choices[0].message.content or "", streamed

    with ThreadPoolExecutor(6) as threads:
        for prompt, (whole, streamed) in zip(chosen, threads.map(asked, chosen), strict=True):
            assert whole == streamed == prompt["answer"].rpartition("</think>")[2].strip(), prompt["name"]


def test_thoughts_come_apart(client: openai.OpenAI) -> None:
    prompt = next(prompt for prompt in PROMPTS if prompt["name"] == "think")
    message = (
        client.chat.completions.create(model="demo", messages=prompt["messages"], temperature=0).choices[0].message
    )
    assert message.content == "12 + 15 = 27."
    assert message.model_extra == {"reasoning_content": "Ones: 2 + 5 = 7. Tens: 1 + 1 + 0 = 2."}


def test_a_round_with_a_tool(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    common: dict[str, Any] = {"model": "demo", "tools": TOOLS, "temperature": 0}
    first = client.chat.completions.create(messages=messages, **common).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.tool_calls and first.message.content is None
    call = first.message.tool_calls[0]
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Paris"}
    with client.chat.completions.stream(messages=messages, **common) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and streamed.message.tool_calls
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    result = '{"city": "Paris", "condition": "sunny", "temperature": 21}'
    given = streamed.message  # as the client has read it, with fields of its own
    messages += [given, {"role": "tool", "tool_call_id": given.tool_calls[0].id, "content": result}]
    second = client.chat.completions.create(messages=messages, **common).choices[0]
    assert second.message.content == "It is sunny in Paris, 21 degrees." and second.finish_reason == "stop"


def test_a_call_that_must_come(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="demo", messages=FRANCE, tools=TOOLS, tool_choice="required", max_tokens=60, temperature=0
    ).choices[0]
    assert choice.message.tool_calls and choice.message.tool_calls[0].type == "function"
    assert choice.message.tool_calls[0].function.name == "get_weather"
    assert json.loads(choice.message.tool_calls[0].function.arguments).keys() == {"city"}


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "people": {"type": "integer", "maximum": 99}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="demo",
        messages=FRANCE,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert value["city"] in ("Paris", "Rome") and isinstance(value["people"], int) and value["people"] <= 99


def test_the_same_seed_is_the_same_answer(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 20, "temperature": 1.5}
    first, again, other = (client.completions.create(**common, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_log_probabilities(client: openai.OpenAI, demo_sessions: dict[str, Session]) -> None:
    """Of the prompt, as scoring has them; of the answer, the most probable tokens are those chosen."""
    session, prompt = demo_sessions["fp32"], "The capital of France is Paris."
    choice = client.completions.create(
        model="demo", prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    ids = session.tokenizer.encode(prompt)
    values, _ = log_probabilities(session.runner, ids)
    assert choice.logprobs.token_logprobs[0] is None  # type: ignore[comparison-overlap]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1 : len(ids)], values, atol=2e-4)
    chat = client.chat.completions.create(
        model="demo", messages=FRANCE, logprobs=True, top_logprobs=2, temperature=0
    ).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content
    assert "".join(entry.token for entry in chat.logprobs.content) == chat.message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in chat.logprobs.content)


def test_clients_that_leave(client: openai.OpenAI, url: str) -> None:
    """More than there are slots, streaming and not, some of them while they wait."""
    common: dict[str, Any] = {"model": "demo", "prompt": "One", "max_tokens": 480, "extra_body": {"min_tokens": 480}}

    before = metric(url, CANCELLED)

    def leave(number: int) -> None:
        if number % 2:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.1 + number / 100).completions.create(**common)
        else:
            stream = client.completions.create(**common, stream=True)
            for _ in zip(range(number // 2), stream, strict=False):
                pass
            stream.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(8)))
    assert free(url)
    assert metric(url, CANCELLED) - before >= 6
    assert client.chat.completions.create(model="demo", messages=FRANCE, temperature=0).choices[0].message.content


def test_errors(client: openai.OpenAI, url: str) -> None:
    long: list[Any] = [{"role": "user", "content": "Hello! " * 600}]
    with pytest.raises(openai.BadRequestError, match=r"a slot holds 512") as raised:
        client.chat.completions.create(model="demo", messages=long)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match=r"there is no 'gpt-5'; served: demo"):
        client.chat.completions.create(model="gpt-5", messages=FRANCE)
    with pytest.raises(openai.BadRequestError, match="reasoning_effort: unknown field"):
        client.chat.completions.create(model="demo", messages=FRANCE, reasoning_effort="low")
    with pytest.raises(openai.BadRequestError, match="found 999999"):
        client.chat.completions.create(model="demo", messages=FRANCE, logit_bias={"999999": 1})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    assert [model.id for model in client.models.list()] == ["demo"]
    assert httpx.get(f"{url}/ready").status_code == 200
