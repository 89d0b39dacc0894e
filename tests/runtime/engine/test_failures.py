"""What goes wrong in an engine, around its runs: it takes down whom it was for, and nobody else."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glm4runtime import Engine, Request, SamplingParams, UserError
from glm4runtime.engine import EngineClosed, RequestFailed, Result
from glm4runtime.text.grammar import Structure
from tests.runtime.engine.conftest import LoadEngine

FEW = SamplingParams(max_new_tokens=8, min_new_tokens=8)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 2000, length).tolist()


def failing(where: Any, name: str, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int = 1) -> None:
    """Make a method raise, so many times."""
    right, left = getattr(where, name), [error] * times

    def run(*arguments: Any, **named: Any) -> Any:
        if left:
            raise left.pop()
        return right(*arguments, **named)

    monkeypatch.setattr(where, name, run)


def idle(engine: Engine) -> bool:
    stats = engine.stats().scheduler
    return engine.stats().healthy and not stats.running and not stats.waiting and not engine._worker.loop.failed


@pytest.mark.parametrize(
    ("method", "settings"),
    [("write_rows", {}), ("copy_rows", {"n": 3, "params": SamplingParams(max_new_tokens=8, temperature=1, seed=1)})],
)
def test_rows_that_cannot_be_moved_fail_their_request(
    load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any]
) -> None:
    engine = load_engine()
    bystander = Request(prompt(20, 1), params=SamplingParams(max_new_tokens=60, min_new_tokens=60))
    wanted = engine.generate(bystander).result().choices
    request = Request(prompt(130), **{"params": FEW, **settings})
    right = engine.generate(request).result().choices
    beside = engine.submit(bystander)
    next(beside)
    failing(engine.runner, method, monkeypatch, RuntimeError("no copy"))
    with pytest.raises(RequestFailed, match="the request failed: RuntimeError: no copy"):
        engine.generate(request).result(30)
    assert beside.result().choices == wanted
    assert engine.generate(request).result().choices == right
    assert idle(engine)


@pytest.mark.parametrize("mode", ["prompt", "all"])
def test_rows_that_cannot_be_kept_fail_nobody(
    load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    engine = load_engine(prefix_cache=mode)
    failing(engine.runner, "read_rows", monkeypatch, MemoryError(), times=1 if mode == "prompt" else 2)
    first, again, hit = (engine.generate(Request(prompt(130), params=FEW)).result() for _ in range(3))
    assert first.choices == again.choices == hit.choices
    assert hit.usage.cached_tokens == 128
    assert idle(engine)


def test_an_error_without_a_message_is_told(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    failing(engine.runner, "prefill", monkeypatch, MemoryError())
    with pytest.raises(RequestFailed, match="the request failed: MemoryError: no message"):
        engine.generate(Request(prompt(9))).result(30)
    assert idle(engine)
    failing(engine._worker.scheduler, "plan", monkeypatch, MemoryError())
    with pytest.raises(RequestFailed, match="the engine's thread died: MemoryError"):
        engine.generate(Request(prompt(9))).result(30)


def test_who_called_is_told_of_a_fault_of_the_same_step(
    load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine()
    failing(engine._worker.scheduler, "plan", monkeypatch, MemoryError())
    told: list[Exception] = []

    def call() -> None:
        try:
            engine.call(lambda: None)
        except RequestFailed as error:
            told.append(error)

    assert within(30, call) and "the engine's thread died: MemoryError" in str(told[0])


def test_a_prompt_without_numbers_is_not_kept(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    right = engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda *given: right(*given) * np.float32(np.nan))
    with pytest.raises(RequestFailed, match="finite maximum"):
        engine.generate(Request(prompt(130), params=FEW)).result(30)
    monkeypatch.undo()
    assert engine.generate(Request(prompt(130), params=FEW)).result().usage.cached_tokens == 0


def test_masks_that_fail_end_the_structured_answers(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    engine = load_engine()
    structured = Request(prompt(9), structure=Structure(regex="[a-z ]{90,}"), params=FEW)
    for allowed in (0, 3):  # at the prompt's end, and beside a run
        calls = iter([None] * allowed)

        def fill(matchers: Any, calls: Any = calls, right: Any = engine._preparation) -> None:
            from glm4runtime.text.structure import fill_masks

            if next(calls, "over") == "over":
                raise MemoryError
            fill_masks(matchers)

        monkeypatch.setattr("glm4runtime.engine.loop.fill_masks", fill)
        beside = engine.submit(Request(prompt(9, 1), params=FEW))
        with pytest.raises(RequestFailed, match="MemoryError"):
            engine.generate(structured).result(30)
        assert beside.result().choices[0].finish_reason == "length"
    assert idle(engine)


def within(seconds: float, function: Callable[[], Any]) -> bool:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_a_handle_is_collected_whatever_locks_are_held(load_engine: LoadEngine) -> None:
    engine = load_engine()
    handles = [engine.submit(Request(prompt(9), params=SamplingParams(max_new_tokens=200, min_new_tokens=200)))]
    next(handles[0])

    def collect() -> None:
        handles.clear()
        gc.collect()

    with engine._worker.condition:  # as the engine's thread has it, which then wants the lock of a reader who collects
        assert within(10, collect)
    assert engine.drain(30)
    assert engine.stats().finished == {"cancelled": 1}


def test_two_who_wait_in_an_event_loop_both_wake(load_engine: LoadEngine) -> None:
    handle = load_engine().submit(Request(prompt(9), params=FEW))

    async def both() -> list[Result]:
        return await asyncio.wait_for(asyncio.gather(handle.result_async(), handle.result_async()), 30)

    one, other = asyncio.run(both())
    assert one == other and len(one.choices[0].tokens) == 8


def test_an_interrupted_submit_leaves_nothing(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    right = engine._worker.scheduler.submit

    def interrupted(id: int, *given: Any, **named: Any) -> None:
        right(id, *given, **named)
        if named["parent"] is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine._worker.scheduler, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.submit(Request(prompt(9), n=3, params=FEW))
    monkeypatch.undo()
    assert engine.generate(Request(prompt(9), params=FEW)).result(30).choices[0].finish_reason == "length"
    assert idle(engine)


def test_a_drained_engine_saves_its_prefixes_and_a_closed_one_starts_nothing(
    load_engine: LoadEngine, tmp_path: Any
) -> None:
    engine = load_engine()
    engine.generate(Request(prompt(130), params=FEW)).result()
    assert engine.drain(30)
    engine.save_prefixes(tmp_path / "prefixes")
    assert engine.call(lambda: engine.call(lambda: 5)) == 5
    engine.close()
    with pytest.raises(EngineClosed, match="the engine is closed; load the bundle again"):
        engine.submit(Request(messages=[{"role": "user", "content": "Hello"}]))
    assert "template" not in engine._text.__dict__
    with pytest.raises(EngineClosed, match="the engine is closed"):
        engine.save_prefixes(tmp_path / "again")


def test_who_submits_while_the_engine_closes_is_told_so(
    load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine()
    template = engine.template
    right = template.render

    def render(*given: Any, **named: Any) -> str:
        engine.close()
        return right(*given, **named)

    monkeypatch.setattr(template, "render", render)
    with pytest.raises(EngineClosed, match="the engine is closed; load the bundle again"):
        engine.submit(Request(messages=[{"role": "user", "content": "Hello"}]))
    assert "template" not in engine._text.__dict__


def test_a_forked_child_is_told(load_engine: LoadEngine) -> None:
    engine = load_engine()
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._worker.condition:
            locked.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait(30)
    child = os.fork()
    if not child:
        status = 1
        try:
            engine.submit(Request([5]))
        except EngineClosed as error:
            status = 0 if "the process forked" in str(error) else 2
        finally:
            engine.close()
            os._exit(status)
    release.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
    assert engine.generate(Request(prompt(9), params=FEW)).result(30).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stall_ms": 0}, "stall_ms=0: expected a finite number of milliseconds above 0"),
        ({"stall_ms": "5"}, "stall_ms='5': expected a finite number"),
        ({"max_queue": -1}, "max_queue=-1 must be at least 0"),
        ({"max_queue": 1.5}, "max_queue=1.5 is not a whole number"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes=-1 must be at least 0"),
        ({"prefix_cache": "some"}, "prefix_cache='some': expected prompt, all, off"),
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"cuda_graphs": 1}, "cuda_graphs=1 is not True or False"),
    ],
)
def test_settings_are_refused_before_a_bundle_is_opened(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine.load("there is no such folder", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": {"regex": "a"}}, "structure: expected a Structure, found"),
        ({"template_variables": None}, "template_variables: expected a mapping, found None"),
        ({"timeout": 10**400}, "timeout: expected a finite number"),
        ({"num_beams": 2, "logprobs": 1}, "num_beams=2 goes with no logprobs"),
        ({"num_beams": 2, "params": SamplingParams(banned_tokens=[5])}, r"goes with no params\.banned_tokens"),
    ],
)
def test_fields_that_would_be_passed_over_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request("Hello", **settings)


def test_a_stop_string_is_text(load_engine: LoadEngine) -> None:
    with pytest.raises(UserError, match=r"stop: '\\ud800' is not valid Unicode"):
        load_engine().submit(Request("Hello", stop=["\ud800"]))
