"""What an engine of a batch does with its rows; tools/ray_check.py has Ray Data around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm4runtime.contract import UserError
from glm4runtime.engine import EngineClosed, RequestFailed
from glm4runtime.sampling import SamplingParams
from glm4serve.deploy import ray_batch


@pytest.fixture(scope="module")
def answers(demo_bundles: dict[str, Path]) -> Any:
    made = ray_batch._Answers(demo_bundles["fp32"], {"slots": 2, "max_seq_len": 64}, SamplingParams(max_new_tokens=12))
    yield made
    made._engine.close()


def test_a_row_that_can_not_be_answered_ends_no_batch(answers: Any) -> None:
    rows = {"id": np.arange(3), "prompt": np.array(["One, two", "long " * 500, ""], dtype=object)}
    found = answers(rows)
    assert found["id"] is rows["id"] and found["finish_reason"] == ["length", "error", "error"]
    assert found["answer"][0] and found["answer"][1:] == ["", ""]
    assert found["error"][0] == "" and "a slot holds 64" in found["error"][1] and "empty" in found["error"][2]


def test_messages_as_a_column_has_them(answers: Any) -> None:
    """Ray Data gives every message the fields that any of them has."""
    user = {"role": "user", "content": "What is the capital of France?", "tool_calls": None, "name": None}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}", "strict": None}}
    called = {"role": "assistant", "content": "", "tool_calls": np.array([call], dtype=object), "name": None}
    chats = [np.array([user], dtype=object), [user, "no object"], np.array([user, called, user], dtype=object)]
    found = answers({"messages": chats})
    assert found["answer"][0] == "The capital of France is Paris." and found["error"][0] == found["error"][2] == ""
    assert "expected objects, found" in found["error"][1]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("prompt", None, "prompt: expected a text, found None"),
        ("prompt", float("nan"), "prompt: expected a text, found nan"),  # pandas' word for none
        ("messages", None, "messages: expected a list of objects, found None"),
        ("messages", "Hi", "messages: expected a list of objects, found 'Hi'"),
    ],
)
def test_a_row_without_what_is_asked(answers: Any, name: str, value: Any, told: str) -> None:
    found = answers({name: [value]})
    assert found["error"] == [told] and found["answer"] == [""] and found["finish_reason"] == ["error"]


@pytest.mark.parametrize("death", [None, "its thread died"])
def test_a_row_that_the_engine_fails_on(answers: Any, death: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends no batch, unless the engine ended with it."""

    def fail() -> None:
        raise RequestFailed("the request failed: no numbers")

    stats = SimpleNamespace(death=death)
    monkeypatch.setattr(answers._engine, "submit", lambda request: SimpleNamespace(result=fail))
    monkeypatch.setattr(answers._engine, "stats", lambda: stats)
    if death is None:
        assert answers({"prompt": ["a", "b"]})["error"] == ["the request failed: no numbers"] * 2
    else:
        with pytest.raises(RequestFailed):
            answers({"prompt": ["a"]})


def test_an_engine_that_died_ends_the_batch(answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that Ray puts another one in its place."""

    def closed(request: Any) -> None:
        raise EngineClosed("its thread has died")

    monkeypatch.setattr(answers._engine, "submit", closed)
    with pytest.raises(EngineClosed):
        answers({"prompt": ["a"]})


def test_a_parameter_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_batch, "require_ray", lambda: None)
    rows: Any = None
    with pytest.raises(UserError, match=r"max_tokens: no such parameter; they are temperature, .*max_new_tokens"):
        ray_batch.answers(rows, "bundle", replicas=1, threads=1, max_tokens=5)
