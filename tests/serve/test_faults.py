"""An engine that dies, and a bundle that is replaced, under a service that goes on as far as it can."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glm4export.bundle.swap import NEW, swap
from glm4runtime import Engine
from glm4serve import create_app
from tests.helpers.asgi import ASK, CHAT, ask, events

GREEDY = {**ASK, "temperature": 0, "max_tokens": 12, "logprobs": True}


@pytest.fixture
def bundle(demo_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """One that may be replaced."""
    return Path(shutil.copytree(demo_bundles["fp32"], tmp_path / "bundle"))


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.load(bundle, slots=2, max_seq_len=128, threads=1, prefix_cache="off") as opened:
        yield opened


def answer(app: Any) -> Any:
    response = ask(app, CHAT, GREEDY)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.mark.parametrize("replace", ["build", "remove"])
def test_a_bundle_that_is_replaced(
    replace: str, bundle: Path, engine: Engine, demo_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The open one goes on answering, to the bit, from what it has in memory; health says that there is another."""
    app = create_app({"m": engine})
    before = answer(app)
    assert "bundle_changed" not in ask(app, "/health").json()["models"]["m"]
    if replace == "build":
        new = Path(shutil.copytree(demo_bundles["fp16"], tmp_path / "scratch" / NEW))
        swap(new.parent, bundle, lambda folder: None)  # as a build's last step
        shutil.rmtree(new.parent)
    else:
        shutil.rmtree(bundle)
    response = ask(app, "/health")
    assert response.status_code == 200 and response.json()["models"]["m"]["bundle_changed"] is True
    assert answer(app) == before
    if replace == "build":
        with Engine.load(bundle, slots=2, max_seq_len=128, threads=1) as other:
            assert answer(create_app({"m": other})) != before


def test_an_engine_s_thread_that_dies(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is told, without what it was that failed; then nothing is taken any more."""
    app, steps = create_app({"m": engine}), 0
    decoded = engine._worker.scheduler.decoded

    def die(seconds: float) -> None:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise MemoryError("/home/me/secret")
        decoded(seconds)

    monkeypatch.setattr(engine._worker.scheduler, "decoded", die)
    stream = ask(app, CHAT, {**GREEDY, "stream": True})
    assert stream.status_code == 200 and "secret" not in stream.text
    last = events(stream)[-1]["error"]
    assert (last["code"], last["message"]) == ("request_failed", "the model failed on this request")
    refused = ask(app, CHAT, GREEDY)
    assert refused.status_code == 503 and "secret" not in refused.text
    health = ask(app, "/health")
    assert health.status_code == 503 and health.json()["models"]["m"]["reason"] == "its thread has died"
    assert engine.stats().death == "MemoryError: /home/me/secret"


def test_the_server_of_a_dead_engine_ends() -> None:
    """By itself, with status 1, so that whoever started it can start it again; its log says what happened."""
    command = [sys.executable, "-m", "tests.helpers.fake_server", "0", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            url = process.stdout.readline().strip()
            told = httpx.post(f"{url}{CHAT}", json={**ASK, "max_tokens": 3, "seed": 666})
            assert told.status_code == 500 and told.json()["error"]["code"] == "request_failed"
            assert process.wait(30) == 1
        finally:
            process.kill()
        lines = [json.loads(line) for line in process.stderr]
    assert [line["event"] for line in lines[-3:]] == ["engine died", "draining", "ended"]
    assert lines[-3]["reason"] == "MemoryError: no more" and lines[-2]["by"] == "death"
