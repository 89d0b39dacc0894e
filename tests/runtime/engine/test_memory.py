"""What a request leaves behind in an engine's memory: nothing, and without waiting for the garbage collector.

It would keep its rows of logits, 600 kB each for GLM-4's vocabulary, beside its prompt and its answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.engine import QueueFull, RequestFailed
from glm4runtime.text.grammar import Structure
from tests.helpers.garbage import left_behind
from tests.runtime.engine.conftest import LoadEngine

FEW = SamplingParams(max_new_tokens=8)
LONG = SamplingParams(max_new_tokens=200, min_new_tokens=200)
Ask = Callable[[Engine], object]


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(300, 2000, length).tolist()


def require_nothing_left(engine: Engine, *asks: Ask) -> None:
    """All at once: the collector's own look at all of a test process takes longer than they do."""

    def act() -> None:
        for ask in asks:
            ask(engine)

    assert left_behind(act) == set()


def test_answers(load_engine: LoadEngine) -> None:
    pytest.importorskip("llguidance")
    filters = SamplingParams(max_new_tokens=8, temperature=1.0, top_p=0.9, min_p=0.1, typical_p=0.9)
    penalties = SamplingParams(max_new_tokens=8, repetition_penalty=1.1, frequency_penalty=0.1)
    every: list[dict[str, Any]] = [
        {"params": FEW},
        {"params": filters, "n": 2},
        {"params": penalties, "logprobs": 2, "prompt_logprobs": 1},
        {"params": filters, "best_of": 3},
        {"params": FEW, "num_beams": 2},
        {"params": FEW, "lookup": 4},
        {"params": FEW, "structure": Structure(regex="[a-z ]{4,9}")},
        {"params": FEW, "timeout": 1e-6},
    ]

    def ask(engine: Engine) -> None:
        for fields in every:
            engine.generate(Request(prompt(20), **fields)).result()

    require_nothing_left(load_engine(), ask)


def cancelled(engine: Engine) -> None:
    handle = engine.submit(Request(prompt(20), params=LONG, n=2))
    next(handle)
    handle.cancel()
    handle.result()


def refused(engine: Engine) -> None:
    told, right = threading.Event(), engine.runner.step

    def step(*given: Any) -> np.ndarray:
        told.wait(60)
        return right(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "step", step)  # the slot is taken, however slow this thread is
        running = engine.submit(Request(prompt(20), params=LONG))
        with pytest.raises(QueueFull):
            engine.submit(Request(prompt(20), params=FEW, n=2))
    running.cancel()
    told.set()
    running.result()


def given_up(engine: Engine) -> None:
    """By who waited in an event loop."""

    async def leave() -> None:
        handle = engine.submit(Request(prompt(20), params=LONG))
        reader = asyncio.ensure_future(handle.result_async())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        handle.cancel()
        await handle.result_async()

    asyncio.run(leave())


def failed_call(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0)


def test_what_ends_early(load_engine: LoadEngine) -> None:
    require_nothing_left(load_engine(slots=1, max_queue=0), cancelled, refused, given_up, failed_call)


def no_numbers(right: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *given: right(*given) * np.float32(np.nan)


def no_run(right: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def run(*given: Any) -> np.ndarray:
        raise MemoryError

    return run


def with_its_cause(error: RequestFailed) -> bool:
    return error.__cause__ is not None and error.__cause__.__traceback__ is not None


FAILURES: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("prefill", no_run, {}),
    ("prefill", no_numbers, {"n": 2}),
    ("step", no_run, {"n": 3}),
    ("step", no_numbers, {"num_beams": 2}),
    ("read_rows", no_run, {"num_beams": 3}),
    ("verify", no_run, {"lookup": 4}),
]


@pytest.mark.parametrize("in_loop", [False, True], ids=["result", "loop"])
def test_failures(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch, in_loop: bool) -> None:
    """Errors have tracebacks, and tracebacks have variables."""

    async def failed_in_loop(engine: Engine, request: Request) -> bool:
        try:  # here, since asyncio's own task would keep its error, and the error the task
            await engine.generate(request).result_async()
        except RequestFailed as error:
            return with_its_cause(error)
        return False

    def failed(engine: Engine, request: Request) -> bool:
        try:
            engine.generate(request).result()
        except RequestFailed as error:
            return with_its_cause(error)
        return False

    def ask(engine: Engine) -> None:
        for method, wrong, fields in FAILURES:
            monkeypatch.setattr(engine.runner, method, wrong(getattr(engine.runner, method)))
            request = Request(prompt(20), params=FEW, **fields)
            assert asyncio.run(failed_in_loop(engine, request)) if in_loop else failed(engine, request)
            monkeypatch.undo()

    require_nothing_left(load_engine(), ask)


def test_those_who_wait_no_more_are_not_kept(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=1)
    running, waiting = (engine.submit(Request(prompt(20), params=LONG)) for _ in range(2))

    async def poll() -> None:
        for _ in range(20):
            reader = asyncio.ensure_future(waiting.__anext__())
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])

    asyncio.run(poll())
    assert len(waiting._feed._waiters) <= 1
    running.cancel()
    waiting.cancel()
