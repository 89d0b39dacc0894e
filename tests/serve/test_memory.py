"""What a request leaves behind in the service's memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from glm4runtime import Engine
from glm4serve import create_app
from tests.helpers.garbage import left_to_the_collector
from tests.helpers.live import live

ENGINE_TYPES = {"Request", "Handle", "Feed", "Result", "Job", "Answer", "Sampler", "Turn", "PromptTooLong"}


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
    ],
    ids=["whole", "stream", "refused", "too long"],
)
def test_a_request_that_has_ended_holds_no_memory(
    engine: Engine, text: str, fields: dict[str, object], status: int
) -> None:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "logprobs": True, **fields}
    app = create_app({"m": engine})
    with live(app) as url:

        def ask() -> None:
            data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
            try:
                with urlopen(Request(f"{url}/v1/chat/completions", data, headers)) as answer:
                    answer.read()
                    found = answer.status
            except HTTPError as error:
                found = error.code
                error.close()
            assert found == status
            while app.state.service.in_flight:
                pass
            engine.call(lambda: None)

        assert not left_to_the_collector(ask) & ENGINE_TYPES
