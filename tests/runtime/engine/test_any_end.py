"""Requests of every kind that end in every way, runs that fail among them: what must hold whatever came when."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.engine import Handle, QueueFull, RequestFailed
from glm4runtime.engine.job import Job
from glm4runtime.text.grammar import Structure
from tests.runtime.engine.conftest import LoadEngine

KINDS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"best_of": 3},
    {"num_beams": 3, "params": SamplingParams(max_new_tokens=20)},
    {"lookup": 7, "n": 2},
    {"structure": Structure(regex="[a-z ]{3,20}"), "n": 2},
    {"logprobs": 2, "prompt_logprobs": 1, "n": 2},
]
SHARE = {"prefill": 0.05, "step": 0.02, "verify": 0.02, "copy_rows": 0.1, "read_rows": 0.1, "write_rows": 0.1}


def break_runs(engine: Engine, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a share of each kind of run fail, or give no numbers."""

    def broken(right: Callable[..., Any], share: float) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            found = right(*given)
            if rng.random() >= share:
                return found
            if found is not None and found.dtype == np.float32 and rng.random() < 0.4:
                return found * np.float32(np.nan)
            raise rng.choice([MemoryError(), RuntimeError("boom")])

        return run

    for method, share in SHARE.items():
        monkeypatch.setattr(engine.runner, method, broken(getattr(engine.runner, method), share))


def asked(rng: random.Random) -> Request:
    prompt = [rng.randrange(300, 2000) for _ in range(rng.choice([1, 5, 40, 130, 200]))]
    params = SamplingParams(
        max_new_tokens=rng.choice([1, 5, 30]), temperature=rng.choice([0, 1.0]), seed=1, top_p=rng.choice([0.9, 1.0])
    )
    timeout = rng.choice([None, None, None, 1e-4, 0.02])
    fields = {"params": params, "key": rng.choice("abc"), "timeout": timeout, **rng.choice(KINDS)}
    return Request(prompt, **fields)


def jobs() -> list[Job]:
    return [found for found in gc.get_objects() if type(found) is Job]


def test_counts_slots_and_memory_are_right(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    engine = load_engine(slots=3, max_queue=4, prefix_cache="all", prefix_cache_bytes=1 << 22)
    rng = random.Random(0)
    used: Counter[str] = Counter()
    answers = 0

    def read(handle: Handle) -> None:
        try:
            if rng.random() < 0.3:
                next(handle, None)
            if rng.random() < 0.4:
                handle.cancel()
            handle.result(60)
        except RequestFailed:
            pass
        assert handle.done and handle.timing.finished is not None
        if handle.timing.started is not None:
            used.update(vars(handle.usage))

    gc.collect()
    gc.disable()
    others = len(jobs())  # of engines before this one
    try:
        with monkeypatch.context() as broken:
            break_runs(engine, random.Random(1), broken)
            for _ in range(25):
                handles = []
                for request in (asked(rng) for _ in range(6)):
                    try:
                        handles.append(engine.submit(request))
                    except QueueFull:
                        continue
                    answers += max(request.n, request.best_of or 0, request.num_beams)
                while handles:
                    read(handles.pop(rng.randrange(len(handles))))
        del request
        used.update(vars(engine.generate(Request([5])).result(60).usage))  # its runs work: the engine is healthy again
        answers += 1
        assert engine.drain(60)
        engine.call(lambda: None)  # a step later the thread's own variables are others
        stats, worker = engine.stats(), engine._worker
        counted = {name: getattr(stats, name) for name in used}
        assert counted == dict(used) and stats.finished["error"] > 0
        assert sum(stats.finished.values()) == answers
        assert stats.healthy and not worker.answers and not worker.loop.failed and not worker.scheduler._queues
        assert len(worker.scheduler._free) == 3
        assert engine._store is not None and not any(node.pins for node in engine._store.nodes())
        assert len(jobs()) <= others
    finally:
        gc.enable()
