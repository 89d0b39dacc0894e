"""What a request leaves behind in the service's memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest

from glm4runtime import Engine, Request
from glm4runtime.engine import Handle, RequestFailed, Result
from glm4runtime.engine.handle import Feed
from glm4runtime.engine.job import Answer, Job
from glm4runtime.engine.prepare import PromptTooLong
from glm4runtime.sampling import Sampler
from glm4runtime.text.turn import Turn
from glm4serve import create_app
from tests.helpers.garbage import left_behind
from tests.helpers.live import live

FAILS = 5
ENGINE_TYPES = {Request, Handle, Feed, Result, Job, Answer, Sampler, Turn, PromptTooLong, RequestFailed}


@pytest.fixture(scope="module")
def engine(demo_bundles: dict[str, Path]) -> Iterator[Engine]:
    with Engine.load(demo_bundles["fp32"], slots=2, max_seq_len=128) as engine:
        yield engine


@pytest.mark.parametrize(
    ("text", "fields", "status"),
    [
        ("Hello", {"top_p": 0.9}, 200),
        ("Hello", {"stream": True}, 200),
        ("Hello", {"stop": [""]}, 400),
        ("word " * 5000, {}, 400),
        ("Hello", {"seed": FAILS}, 500),
        ("Hello", {"seed": FAILS, "stream": True}, 200),
    ],
    ids=["whole", "stream", "refused", "too long", "failed", "failed stream"],
)
def test_a_request_that_has_ended_holds_no_memory(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str, fields: dict[str, object], status: int
) -> None:
    if fields.get("seed") == FAILS:
        monkeypatch.setattr(engine.runner, "prefill", lambda *_: 1 / 0)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "logprobs": True, **fields}
    with live(create_app({"m": engine})) as url:

        def ask() -> None:
            data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
            try:
                with urlopen(HttpRequest(f"{url}/v1/chat/completions", data, headers), timeout=60) as answer:
                    answer.read()
                    found = answer.status
            except HTTPError as error:
                found = error.code
                error.close()
            assert found == status

        assert left_behind(ask, ENGINE_TYPES) == set()
