"""Faults of ours, where an answer or the engine ends: nobody waits for ever, and everything is counted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.engine import RequestFailed
from glm4runtime.engine.failure import failure
from glm4runtime.engine.job import Answer, Job
from glm4runtime.sampling.beams import BeamSearch
from tests.runtime.engine.conftest import LoadEngine

FEW = SamplingParams(max_new_tokens=3)
LONG = SamplingParams(max_new_tokens=200, min_new_tokens=200)
Broken = tuple[Any, str]


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(300, 2000, length).tolist()


def boom(*_: Any) -> None:
    raise MemoryError("boom")


def held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have each step wait until the event is set."""
    go, right = threading.Event(), engine.runner.step

    def step(*given: Any) -> np.ndarray:
        go.wait(60)
        return right(*given)

    monkeypatch.setattr(engine.runner, "step", step)
    return go


def dead(engine: Engine) -> str | None:
    """What its thread died of, once it has ended."""
    engine._worker.thread.join(30)
    stats = engine.stats()
    assert (stats.scheduler.running, stats.scheduler.waiting) == (0, 0) and not engine._worker.answers
    return stats.death


@pytest.mark.parametrize(
    ("broken", "fields"),
    [
        (lambda _: (Answer, "end"), {"n": 2}),
        (lambda _: (BeamSearch, "best"), {"num_beams": 2, "params": SamplingParams(max_new_tokens=200)}),
        (lambda engine: (engine.runner, "release"), {}),
        (lambda _: (Job, "_result"), {"best_of": 2}),
    ],
    ids=["end", "beams", "release", "result"],
)
def test_a_fault_where_an_answer_ends_is_told_and_counted(
    load_engine: LoadEngine,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Engine], Broken],
    fields: dict[str, Any],
) -> None:
    engine = load_engine()
    go = held(engine, monkeypatch)
    with engine._worker.condition:  # both are there before the first step, which waits
        ended = engine.submit(Request(prompt(20), **{"params": LONG, **fields}))
        beside = engine.submit(Request(prompt(30)))
    next(beside)
    with monkeypatch.context() as patch:
        patch.setattr(*broken(engine), boom)
        ended.cancel()
        go.set()
        for handle in (ended, beside):
            with pytest.raises(RequestFailed, match="MemoryError: boom"):
                handle.result(30)
        assert dead(engine) == "MemoryError: boom"
    stats = engine.stats()
    answers = max((fields[name] for name in fields if name != "params"), default=1)
    assert sum(stats.finished.values()) == answers + 1
    assert stats.finished["error"] >= 2
    assert stats.prompt_tokens == 50


def test_a_fault_where_a_request_fails_is_told(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    monkeypatch.setattr(engine.runner, "step", boom)
    monkeypatch.setattr(engine.runner, "release", boom)
    with pytest.raises(RequestFailed, match="MemoryError: boom"):
        engine.generate(Request(prompt(20), n=2)).result(30)
    assert dead(engine) == "MemoryError: boom"
    assert engine.stats().finished == {"error": 2}


@pytest.mark.parametrize("fault", [None, (Answer, "end"), (Job, "_result")], ids=["none", "end", "result"])
def test_a_closed_engine_has_told_and_counted_all(
    load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch, fault: Broken | None
) -> None:
    engine = load_engine(slots=1)
    go = held(engine, monkeypatch)
    running, waiting = (engine.submit(Request(prompt(length), params=LONG)) for length in (20, 30))
    next(running)
    closing = threading.Thread(target=engine.close)
    with monkeypatch.context() as patch:
        if fault is not None:
            patch.setattr(*fault, boom)
        closing.start()
        while not engine._worker.closing:
            closing.join(0.01)
        go.set()
        assert dead(engine) is None
        for handle in (running, waiting):
            if fault is None:
                assert handle.result(0).choices[0].finish_reason == "cancelled"
            else:
                with pytest.raises(RequestFailed, match="the request failed: MemoryError: boom"):
                    handle.result(0)
    stats = engine.stats()
    assert stats.finished == {"cancelled" if fault is None else "error": 2}
    assert (stats.prompt_tokens, stats.completion_tokens) == (20, running.usage.completion_tokens)
    assert running.usage.completion_tokens > 0


def test_each_who_calls_has_an_error_of_its_own(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, taken, go = load_engine(), threading.Event(), threading.Event()
    worker, told = engine._worker, []

    def call() -> None:
        try:
            engine.call(lambda: None)
        except RequestFailed as error:
            told.append(error)

    busy = threading.Thread(target=engine.call, args=(lambda: (taken.set(), go.wait(60)),))
    busy.start()
    taken.wait(30)
    others = [threading.Thread(target=call) for _ in range(2)]
    for thread in others:
        thread.start()
    while len(worker._calls) < 2:
        busy.join(0.01)
    monkeypatch.setattr(worker.scheduler, "plan", boom)
    go.set()
    for thread in (busy, *others):
        thread.join(30)
    one, other = told
    assert one is not other and one.__cause__ is other.__cause__ is worker._death


def test_rows_of_a_run_without_numbers_are_not_kept(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(prefix_cache="all")
    right, left = engine.runner.step, iter(range(80))

    def step(*given: Any) -> np.ndarray:
        return right(*given) * np.float32(1 if next(left, None) is not None else np.nan)

    monkeypatch.setattr(engine.runner, "step", step)
    with pytest.raises(RequestFailed, match="finite maximum"):
        engine.generate(Request(prompt(60), params=LONG)).result(30)
    assert engine.stats().prefixes.blocks == 0


def test_frames_are_cleared_once_however_deep_an_error_lies() -> None:
    def dive(depth: int) -> None:
        if not depth:
            raise MemoryError
        dive(depth - 1)

    depth, cleared = 100, 0

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal cleared
        cleared += event == "c_call" and called.__name__ == "clear"

    try:
        dive(depth)
    except MemoryError as error:
        found, before = error, sys.getprofile()
    sys.setprofile(count)
    try:
        failure("the request failed", found)
    finally:
        sys.setprofile(before)
    above, frame = 0, sys._getframe()
    while frame is not None:
        above, frame = above + 1, frame.f_back
    assert depth < cleared <= depth + 1 + above
