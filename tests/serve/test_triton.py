"""Triton's Python backend over a real engine, driven as the server does it; tools/triton_check.py has the server."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4export.bundle.triton import new_model
from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.engine import EngineClosed, RequestFailed
from glm4serve.deploy.triton.tensors import INPUTS
from tests.helpers import fake_triton
from tests.helpers.fake_triton import Sender

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"text_input": "The", "stream": True, "max_new_tokens": 1900, "min_new_tokens": 1900}
DTYPES = {"TYPE_INT64": np.int64, "TYPE_FP64": np.float64, "TYPE_BOOL": np.bool_, "TYPE_STRING": np.object_}

Ask = Callable[..., Sender]


def arrays(given: dict[str, Any]) -> dict[str, np.ndarray]:
    made = {}
    for name, value in given.items():
        items = value if isinstance(value, list) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        made[name] = np.array(items, dtype=DTYPES[INPUTS[name].data_type])
    return made


@pytest.fixture(scope="module")
def repository(demo_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    settings = {"max_seq_len": 2048, "max_queue": 2, "drain": 0}
    return new_model(demo_bundles["fp32"], folder, "glm4", settings, slots=2)


@pytest.fixture(scope="module")
def load(repository: Path) -> Iterator[Callable[..., Any]]:
    """Open the model as Triton's stub does: by the path of its folder, as the module ``1.model``."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from _loader(repository, monkeypatch)


def _loader(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.module())
    monkeypatch.syspath_prepend(str(repository))
    opened: list[Any] = []

    def run(**changed: object) -> Any:
        for name in ("1", "1.model", "1.tensors"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        model = importlib.import_module("1.model").TritonPythonModel()
        given = {"slots": 2, "max_seq_len": 2048, "max_queue": 2, "drain": 0, **changed}
        parameters = {name: {"string_value": json.dumps(value)} for name, value in given.items()}
        parameters["EXECUTION_ENV_PATH"] = {"string_value": "none of the engine's"}
        model.initialize({"model_config": json.dumps({"parameters": parameters}), "model_name": "glm4"})
        opened.append(model)
        return model

    yield run
    for model in opened:
        model.finalize()


@pytest.fixture(scope="module")
def model(load: Callable[..., Any]) -> Any:
    return load()


def ask(model: Any, given: dict[str, Any], **more: Any) -> Sender:
    request = fake_triton.Request(arrays(given), **more)
    assert model.execute([request]) is None
    return request.sender


def test_answers_are_the_engine_s(model: Any, demo_bundles: dict[str, Path]) -> None:
    sampled = SamplingParams(temperature=0.7, top_p=0.9, seed=11, max_new_tokens=12)
    with Engine.load(demo_bundles["fp32"], slots=2, max_seq_len=2048) as engine:
        greedy = engine.submit(Request(messages=QUESTION)).result().choices[0]
        two = engine.submit(Request("The capital", n=2, params=sampled)).result().choices
    senders = [
        ask(model, {"messages": json.dumps(QUESTION), "stream": True, "logprobs": 1}),
        ask(model, {"messages": json.dumps(QUESTION)}),
        ask(model, {"text_input": "The capital", "n": 2, "temperature": 0.7, "top_p": 0.9, "seed": 11,
                    "max_new_tokens": 12}),
    ]  # fmt: skip
    stream, whole, pair = (sender.wait() for sender in senders)
    assert len(stream.responses) > 5 and len(whole.responses) == 1
    assert "".join(stream.texts()) == whole.texts()[0] == greedy.content == "The capital of France is Paris."
    assert stream.ids() == whole.ids() == list(greedy.tokens)
    assert stream.texts("finish_reason") == ["", *[""] * (len(stream.responses) - 2), "stop"]
    last = stream.responses[-1].tensors
    assert (last["prompt_tokens"][0], last["completion_tokens"][0]) == (14, len(greedy.tokens))
    scores = [score for text in stream.texts("logprobs") for score in json.loads(text)]
    assert [score["token"] for score in scores] == list(greedy.tokens)
    assert all(score["top"][0] == [score["token"], score["logprob"]] for score in scores)
    assert [response.tensors["index"][0] for response in pair.responses] == [0, 1]
    assert pair.texts() == [choice.content for choice in two]
    assert len(set().union(*(sender.threads for sender in senders))) == 1
    assert fake_triton.MetricFamily.values.keys() >= {"glm4:num_requests_running", "glm4:generation_tokens_total"}


def test_structures_and_tools(model: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["é", "b"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
    chat = {"messages": json.dumps(QUESTION), "max_new_tokens": 60}
    formed = ask(model, {**chat, "structure": json.dumps({"json_schema": schema})}).wait()
    assert json.loads(formed.texts()[0])["a"] in ("é", "b")
    called = ask(model, {**chat, "tools": json.dumps(tools), "tool_choice": "required"}).wait()
    (call, *_) = json.loads(called.texts("tool_calls")[0])
    assert call["name"] == "look_up" and call["arguments"]["a"] in ("é", "b")
    assert called.texts("finish_reason") == ["tool_calls"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected one of the inputs text_input, input_ids and messages, found none"),
        ({"text_input": "a", "input_ids": [1]}, "input_ids: expected either"),
        ({"text_input": "a", "messages": "[]"}, "expected either prompt or messages, found both"),
        ({"messages": "{"}, "messages: not valid JSON"),
        ({"messages": "[" * 100_000}, "messages: not valid JSON"),
        ({"messages": "{}"}, "messages: expected a JSON list, found {}"),
        ({"messages": "[1]"}, "messages"),
        ({"text_input": b"a\xff"}, "text_input: expected UTF-8, found another byte at 1"),
        ({"text_input": ["a", "b"]}, "text_input: expected one value, found 2"),
        ({"text_input": "a", "temperature": float("nan")}, "temperature: expected a finite number"),
        ({"text_input": "a", "logit_bias": '{"x": 1}'}, "logit_bias: expected token ids as keys, found 'x'"),
        ({"text_input": "a", "logit_bias": '{"1": NaN}'}, "logit_bias: not valid JSON"),
        ({"text_input": "a", "stop": [""]}, "stop: expected token ids"),
        ({"text_input": "a", "structure": '{"tools": []}'}, "structure: expected one of json_schema"),
        ({"messages": json.dumps(QUESTION), "tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"text_input": "a " * 4000}, "a slot holds 2048"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(model: Any, given: dict[str, Any], message: str) -> None:
    sender = ask(model, given).wait()
    ((code, told),) = sender.errors()
    assert code == "INVALID_ARG" and message in told


def test_fields_that_are_no_inputs_are_refused(model: Any) -> None:
    sender = ask(model, {"text_input": "a"}, parameters={"max_tokens": 3, "triton_enable_empty_final_response": True})
    assert sender.wait().errors() == [
        ("INVALID_ARG", "'max_tokens': no such input, and parameters have no effect; see docs/triton.md")
    ]


def test_clients_that_go_free_their_slots(model: Any) -> None:
    senders = [ask(model, LONG) for _ in range(2)]
    for sender in senders:
        assert sender.begun.wait(60)
    waiting = ask(model, LONG | {"stream": False})  # now: requests at once may be submitted in any order
    for sender in (*senders, waiting):
        sender.cancelled = True
    ended = [sender.wait() for sender in (*senders, waiting)]
    # On a machine that is busy elsewhere, an answer may have come to its end before this thread cancelled it.
    cut = [sender for sender in ended if len([r for r in sender.responses if r.error is None]) < 1900]
    assert waiting in cut
    assert all(sender.errors() == [("CANCELLED", "the request was cancelled")] for sender in cut)
    assert ask(model, {"messages": json.dumps(QUESTION)}).wait().texts() == ["The capital of France is Paris."]


def test_a_full_queue_and_a_timeout(model: Any) -> None:
    senders = [ask(model, LONG) for _ in range(2)]
    for sender in senders:
        assert sender.begun.wait(60)
    late = [ask(model, LONG, microseconds=1) for _ in range(1)]
    assert late[0].wait().texts("finish_reason") == ["timeout"]
    queued = [ask(model, LONG) for _ in range(8)]
    for sender in (*senders, *queued):
        sender.cancelled = True
    codes = [code for sender in queued for code, _ in sender.wait().errors()]
    assert len(codes) == 8 and codes.count("UNAVAILABLE") == 6


@pytest.mark.parametrize("drain", [0, 60])
def test_unloading(load: Callable[..., Any], drain: int) -> None:
    """Answers under way come whole where there's time, and end with an error where there's none."""
    model = load(drain=drain)
    sender = ask(model, LONG | {"max_new_tokens": 300, "min_new_tokens": 300})
    assert sender.begun.wait(60)
    model.finalize()
    assert sender.final.is_set()
    if drain:
        assert len(sender.ids()) == 300 and sender.texts("finish_reason")[-1] == "length"
    else:
        assert sender.errors() == [("CANCELLED", "the request was cancelled")]
    model.finalize = lambda: None


SILENT = "the server failed on this request; its log says more"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RuntimeError("in /secret/place"), "INTERNAL", SILENT),
        (RequestFailed("prefill failed: no /secret/place"), "INTERNAL", SILENT),
        (EngineClosed("the engine's thread has died: OSError: /secret/place"), "UNAVAILABLE", "it is being closed, or"),
    ],
)
def test_faults_of_ours_are_logged_and_not_told(
    model: Any, error: Exception, code: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Any) -> None:
        raise error

    monkeypatch.setattr(model._engine, "submit", fail)
    ((found, message),) = ask(model, {"text_input": "a"}).wait().errors()
    assert found == code and told in message and "secret" not in message
    if code == "INTERNAL":
        assert fake_triton.Logger.errors[-1] == f"glm4: {type(error).__name__}: {error}"


def test_a_draft_and_adapters_lie_beside_the_backend(
    demo_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the folder was moved to."""
    bundle = demo_bundles["fp32"]
    folder = new_model(bundle, tmp_path / "models", "glm4", {}, slots=2, draft=bundle, link=True)
    opened: dict[str, Any] = {}
    load = Engine.load

    def look(bundle: Path, **settings: Any) -> Engine:
        opened.update(settings)
        return load(bundle, **settings | {"adapters": None})

    monkeypatch.setattr(Engine, "load", look)
    loader = _loader(folder.rename(tmp_path / "moved"), monkeypatch)
    model = next(loader)(draft="draft", adapters={"polite": "adapters/0"})
    assert opened["draft"] == tmp_path / "moved" / "1" / "draft"
    assert opened["adapters"] == {"polite": tmp_path / "moved" / "1" / "adapters" / "0"}
    drafted = ask(model, {"messages": json.dumps(QUESTION), "draft": 3}).wait()
    assert drafted.texts() == ["The capital of France is Paris."]
    ((code, message),) = ask(model, {"text_input": "a", "adapter": "rude"}).wait().errors()
    assert code == "INVALID_ARG" and "rude" in message
    next(loader, None)


def test_an_engine_that_died_is_told_once(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton calls the model ready all the same, so the log and a metric have to say it."""
    model = load()
    stats = replace(model._engine.stats(), death="IndexError", last_step_age=777.0)
    monkeypatch.setattr(model._engine, "stats", lambda: stats)
    before = len(fake_triton.Logger.errors)
    for _ in range(2):
        model._numbers.update(model._engine)
    told = [text for text in fake_triton.Logger.errors[before:] if "died" in text]
    assert told == ["glm4: the engine died: IndexError; unload the model and load it again"]
    assert fake_triton.MetricFamily.values["glm4:engine_last_step_age_seconds"] == 777
