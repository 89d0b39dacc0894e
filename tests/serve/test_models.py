"""Models by name: bundles, and adapters that their engines have loaded."""

from __future__ import annotations

from typing import Any

import pytest

from glm4runtime.contract import UserError
from glm4serve import create_app
from tests.helpers.asgi import ASK, CHAT, ask
from tests.helpers.fake_engine import FakeEngine, words

ADAPTERS = {"style": "5" * 64, "domain": "d" * 64}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(words("a"), adapters=ADAPTERS)


@pytest.fixture
def app(engine: FakeEngine) -> Any:
    return create_app({"base": engine})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ASK),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {**ASK, "max_tokens": 5}),
    ],
)
def test_an_adapter_is_asked_for_by_its_name(app: Any, engine: FakeEngine, path: str, body: Any) -> None:
    answers = [ask(app, path, {**body, **named}) for named in ({"model": "style"}, {"model": "base"}, {})]
    assert [request.adapter for request in engine.requests] == ["style", None, None]
    assert [answer.json()["model"] for answer in answers] == ["style", "base", "base"]
    unknown = ask(app, path, {**body, "model": "other"})
    assert unknown.status_code == 404 and "served: base, style, domain" in unknown.text


def test_adapters_are_listed_with_their_base(app: Any) -> None:
    listed = {model["id"]: model.get("parent") for model in ask(app, "/v1/models").json()["data"]}
    assert listed == {"base": None, "style": "base", "domain": "base"}
    prints = {ask(app, CHAT, {**ASK, "model": name}).json()["system_fingerprint"] for name in listed}
    assert len(prints) == 3


def test_an_engine_is_counted_once(app: Any) -> None:
    assert list(ask(app, "/health").json()["models"]) == ["base"]
    assert ask(app, "/metrics").text.count("glm4:num_requests_running{") == 1


def test_two_models_of_one_name(engine: FakeEngine) -> None:
    with pytest.raises(UserError, match="an adapter and another model are both called style"):
        create_app({"style": engine})  # type: ignore[dict-item]


def test_a_draft_guesses_for_every_request() -> None:
    engines = [FakeEngine(words("a"), has_draft=has) for has in (True, False)]
    for engine in engines:
        ask(create_app({"m": engine}), CHAT, ASK)  # type: ignore[dict-item]
    assert [engine.requests[0].draft > 0 for engine in engines] == [True, False]
