"""Cancel requests at random points, beside others whose answers must not change.

Each is cancelled while it waits for a slot, while its prompt is computed, or while it decodes, read as a stream or not
read at all, by its handle or by leaving it to the garbage collector. Some have several answers, guesses or beams.
Bystanders are answered all the while. A finding is:

- a slot or a place in the queue that isn't free when the step (and chunk) that is under way at the cancel has ended;
- a reason that is neither ``cancelled`` nor one of an answer that was done before;
- a bystander whose tokens or log-probabilities aren't those it has alone;
- an engine that isn't idle and healthy in the end, or a prefix that is still pinned.

    python tools/attack_engine.py BUNDLE --cancels 500 --seed 0
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.engine import Handle

POINTS = ("queued", "prefill", "decode")
SIZES: dict[str, Any] = {"slots": 3, "max_seq_len": 512, "prefill_chunk": 16, "max_queue": 64}
STEPS = 1  # that begin before a cancel is seen: the next one does
WAIT = 60.0  # seconds for anything that is to happen


class Steps:
    """Counts an engine's steps, and whether an answer is among those under way."""

    def __init__(self, engine: Engine) -> None:
        self.count = 0
        self._engine = engine
        self._gone: dict[Any, int | None] = {}  # feeds that are waited for: the step in which they went
        plan = engine._worker.scheduler.plan

        def counted(now: float) -> Any:
            self.count += 1  # those that were cancelled have just been let go of
            here = {id(answer.job.feed) for answer in engine._worker.answers.values()}
            for feed, step in self._gone.items():
                if step is None and id(feed) not in here:
                    self._gone[feed] = self.count
            return plan(now)

        engine._worker.scheduler.plan = counted  # type: ignore[method-assign]

    def point(self, handle: Handle) -> str | None:
        """What a request is at; None once it has ended."""
        with self._engine._worker.condition:
            answers = [a for a in self._engine._worker.answers.values() if a.job.feed is handle._feed]
            if not answers:
                return None
            if all(answer.slot < 0 for answer in answers):
                return "queued"
            return "prefill" if any(answer.slot >= 0 and answer.in_prompt for answer in answers) else "decode"

    def until_gone(self, feed: Any) -> tuple[int, bool]:
        """Steps from now on until nothing of a request is under way, and whether that came at all."""
        with self._engine._worker.condition:
            began = self.count
            if not any(answer.job.feed is feed for answer in self._engine._worker.answers.values()):
                return 0, True
            self._gone[feed] = None
        end = time.monotonic() + WAIT
        while self._gone[feed] is None and time.monotonic() < end:
            time.sleep(0.0002)
        step = self._gone.pop(feed)
        return (self.count if step is None else step) - began, step is not None


def prompt(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(300, 2000) for _ in range(rng.randint(least, most))]


def victim(rng: random.Random) -> Request:
    """Long enough to be caught anywhere."""
    params = SamplingParams(temperature=1.0, seed=rng.randrange(1000), max_new_tokens=200, min_new_tokens=200)
    kind = rng.choice(("plain", "plain", "several", "best_of", "lookup", "beams"))
    settings: dict[str, Any] = {
        "plain": {},
        "several": {"n": rng.randint(2, 5)},
        "best_of": {"best_of": 3},
        "lookup": {"lookup": 7},
        "beams": {"num_beams": 2, "params": SamplingParams(max_new_tokens=200)},
    }[kind]
    return Request(prompt(rng, 60, 300), **{"params": params, "key": rng.choice("abc"), **settings})


def bystanders(rng: random.Random) -> list[Request]:
    params = ({"temperature": 0.8, "seed": 1}, {}, {"temperature": 1.0, "seed": 2, "top_p": 0.9})
    return [
        Request(prompt(rng, 5, 150), params=SamplingParams(max_new_tokens=24, **p), logprobs=2, n=n, key="bystander")
        for p in params
        for n in (1, 2)
    ]


@contextmanager
def answered_beside(
    engine: Engine, asked: list[Request], wanted: list[Any], found: Counter[str], findings: list[str]
) -> Iterator[None]:
    """Ask again and again in another thread."""
    over = threading.Event()

    def ask() -> None:
        turn = 0
        while not over.is_set():
            at = turn % len(asked)
            try:
                same = engine.generate(asked[at]).result(WAIT).choices == wanted[at]
            except Exception as error:
                findings.append(f"bystander {at}: {error!r}")
                return
            found["same" if same else "different"] += 1
            if not same:
                findings.append(f"bystander {at}: its answer is another one than alone")
            turn += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def reach(point: str, handle: Handle, steps: Steps, rng: random.Random) -> str | None:
    """Wait until a request is at a point, and a little longer; where it is then."""
    order = {name: place for place, name in enumerate(POINTS)}
    end = time.monotonic() + WAIT
    while (at := steps.point(handle)) is not None and order[at] < order[point] and time.monotonic() < end:
        time.sleep(0.0002)
    time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.02))))
    return steps.point(handle)


def cancel_one(engine: Engine, steps: Steps, rng: random.Random, rows: dict[Any, list[int]]) -> list[str]:
    """One request from submit to cancel; what was wrong about it."""
    streamed, dropped = rng.random() < 0.5, rng.random() < 0.2
    point = rng.choice(POINTS)
    fillers = [engine.submit(victim(rng)) for _ in range(4 if point == "queued" else 0)]
    handle = engine.submit(victim(rng))
    reader = None
    if streamed and not dropped:
        reader = threading.Thread(target=lambda given=handle: list(given))  # type: ignore[misc]
        reader.start()
    at, feed = reach(point, handle, steps, rng), handle._feed
    if dropped:
        del handle
        gc.collect()
    else:
        handle.cancel()
    took, gone = steps.until_gone(feed)
    rows.setdefault((at or "done", "dropped" if dropped else "streamed" if streamed else "whole"), []).append(took)
    findings = []
    if not gone or took > STEPS:
        findings.append(f"cancelled at {at}: still there {took} steps later")
    if not feed.wait(WAIT) or feed.result is None:
        findings.append(f"cancelled at {at}: its reader isn't told")
    elif at is not None and not {choice.finish_reason for choice in feed.result.choices} <= {
        "cancelled",
        "length",
        "stop",
    }:
        findings.append(f"cancelled at {at}: ended as {[choice.finish_reason for choice in feed.result.choices]}")
    if reader is not None:
        reader.join(WAIT)
        if reader.is_alive():
            findings.append(f"cancelled at {at}: its stream doesn't end")
    for filler in fillers:
        filler.cancel()
    return findings


def attack(bundle: Path, cancels: int, seed: int, show: Callable[[str], None] = print) -> list[str]:
    """All of it; what was found."""
    rng = random.Random(seed)
    asked = bystanders(rng)
    with Engine.load(bundle, prefix_cache="off", **SIZES) as engine:
        wanted = [engine.generate(request).result().choices for request in asked]
    findings: list[str] = []
    rows: dict[Any, list[int]] = {}
    found: Counter[str] = Counter()
    with Engine.load(bundle, prefix_cache_bytes=1 << 24, **SIZES) as engine:
        steps = Steps(engine)
        with answered_beside(engine, asked, wanted, found, findings):
            for index in range(cancels):
                findings += [f"{index}: {text}" for text in cancel_one(engine, steps, rng, rows)]
        if not engine.drain(WAIT):
            findings.append("the engine isn't idle in the end")
        stats = engine.stats()
        if not stats.healthy or stats.scheduler.running or stats.scheduler.waiting or "error" in stats.finished:
            findings.append(f"in the end: {stats}")
        if len(engine._worker.scheduler._free) != engine.runner.slots or engine._worker.loop.failed:
            findings.append("a slot or a failed answer is left behind")
        if engine._store is not None and any(node.pins for node in engine._store.nodes()):
            findings.append("a prefix is still pinned")
    show(f"{'cancelled at':12} {'read':9} {'requests':>8} {'most steps':>10}")
    for (at, how), took in sorted(rows.items()):
        show(f"{at:12} {how:9} {len(took):8} {max(took):10}")
    show(f"bystanders: {found['same']} answers as alone, {found['different']} others; answers ended: {stats.finished}")
    return findings


def main() -> int:
    """Exit status 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cancels", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    findings = attack(arguments.bundle, arguments.cancels, arguments.seed)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
