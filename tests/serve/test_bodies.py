"""Bodies that are made to keep the service busy: refused before each of their parts costs something."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from glm4serve import Settings
from glm4serve.schema import read_json
from tests.helpers.asgi import ASK, CHAT, ask, leave
from tests.helpers.fake_engine import words
from tests.serve.conftest import Serve


@pytest.mark.parametrize(
    "body",
    [
        {**ASK, **{f"x{number}": 1 for number in range(60_000)}},
        {"messages": [{}] * 60_000},
        {**ASK, "metadata": {"a": [[]] * 60_000}},
    ],
    ids=["keys", "messages", "lists"],
)
def test_more_parts_than_anybody_asks_in(serve: Serve, body: Any) -> None:
    app, _ = serve()
    error = ask(app, CHAT, body).json()["error"]
    assert error["code"] == "invalid_json" and "more than 50000 objects, lists and keys" in error["message"]


def test_ids_and_texts_are_no_parts() -> None:
    body = {"prompt": [[1] * 100_000] * 3, "enum": ["a"] * 100_000}
    assert read_json(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/detokenize", {"tokens": ["a"] * 1000}, "tokens[0]: Input should be a valid integer"),
        (CHAT, {"messages": [1] * 1000}, "messages[0]: "),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "x"}] * 1000}, "messages[0]: "),
    ],
)
def test_the_first_wrong_item_is_told_alone(serve: Serve, path: str, body: Any, told: str) -> None:
    app, _ = serve()
    message = ask(app, path, body).json()["error"]["message"]
    assert message.startswith(told) and "[1]" not in message


def test_an_error_quotes_no_whole_text(serve: Serve) -> None:
    app, _ = serve()
    response = ask(app, CHAT, {"messages": [{"role": "u" * 100_000, "content": "x"}]})
    assert response.status_code == 400 and len(response.content) < 1000


def test_a_whole_answer_that_nobody_reads(serve: Serve) -> None:
    """It is cut as a stream is: the connection isn't kept for ever."""
    app, _ = serve(words("a"), Settings(write_timeout=0.05))

    async def never(messages: list[Any]) -> bool:
        return False

    async def stuck(message: Any) -> None:
        await asyncio.sleep(60)

    leave(app, CHAT, ASK, never, send=stuck)
    assert app.state.service.in_flight == 0
