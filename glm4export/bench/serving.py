"""Time the engine: clients that each ask again as soon as they are answered, beside bare steps of the same graphs."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm4export.bench.report import Spread
from glm4export.machine import Machine, describe
from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.backends.batch import BatchRunner
from glm4runtime.contract import UserError

CLIENTS = (1, 2, 4, 8)
PROMPT = 256  # tokens


@dataclass(frozen=True)
class Percentiles:
    """Of a quantity's values over all requests; seconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Of at least one value."""
        return cls(*(float(value) for value in np.percentile(values, (50, 99))))


@dataclass(frozen=True)
class Load:
    """So many clients at once, each with one request under way."""

    clients: int
    tokens_per_second: float  # of answers, all clients together, prompts included in the time
    first_token_seconds: Percentiles  # from submit on
    token_seconds: Percentiles  # between two tokens of an answer, as its reader sees them
    step_seconds: Spread | None  # of the bare graph with as many rows, half the answer behind the prompt
    overhead: float | None  # of a token of a lone answer, or of answers that all decode, over a bare step


@dataclass(frozen=True)
class ServingReport:
    """What ``glm4export bench --engine`` measured."""

    bundle: str
    precision: str
    machine: Machine
    slots: int
    invariant: bool
    granule: int  # rows of a run have a multiple of it
    prompt_tokens: int
    new_tokens: int
    requests_per_client: int
    loads: tuple[Load, ...]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dataclasses.asdict(self)


def measure(
    engine: Engine,
    *,
    clients: Sequence[int] = CLIENTS,
    prompt_tokens: int = PROMPT,
    new_tokens: int = 64,
    requests: int = 4,
    told: Callable[[str], None] = lambda text: None,
) -> ServingReport:
    """Time an engine without a prefix cache. Prompts are random and never the same; answers don't end early.

    told: is given a line as each load begins. Raises UserError where prompt and answer don't fit a slot, or more
    clients are asked for than there are slots.
    """
    runner = engine.runner
    if prompt_tokens + new_tokens > engine.max_seq_len:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and an answer of {new_tokens}: a slot holds {engine.max_seq_len}"
        )
    if max(clients) > runner.slots:
        raise UserError(f"{max(clients)} clients, and the engine has {runner.slots} slots; ask for more with --slots")
    loads = []
    for count in clients:
        told(f"{count} clients")
        loads.append(_load(engine, count, prompt_tokens, new_tokens, requests))
    return ServingReport(
        bundle=str(engine.folder),
        precision=engine.manifest.precision,
        machine=describe(),
        slots=runner.slots,
        invariant=runner.invariant,
        granule=runner.granule,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests_per_client=requests,
        loads=tuple(loads),
    )


def _load(engine: Engine, clients: int, prompt_tokens: int, new_tokens: int, requests: int) -> Load:
    together = _Answers(engine, prompt_tokens, new_tokens)
    together.read(clients, 1)  # warm, and all begin at once: for most of the time everyone decodes
    steps = engine.call(lambda: _bare_steps(engine.runner, clients, prompt_tokens + new_tokens // 2))
    answers = _Answers(engine, prompt_tokens, new_tokens)
    seconds = answers.read(clients, requests)
    overhead = float(np.median(together.between)) / steps.median - 1 if together.between else None
    return Load(
        clients,
        clients * requests * new_tokens / seconds,
        Percentiles.of(answers.first),
        Percentiles.of(answers.between),
        steps,
        overhead,
    )


class _Answers:
    """Clients' requests, and when their tokens came."""

    def __init__(self, engine: Engine, prompt_tokens: int, new_tokens: int) -> None:
        self.first: list[float] = []
        self.between: list[float] = []
        self._engine, self._prompt, self._new = engine, prompt_tokens, new_tokens
        self._random = np.random.default_rng()

    def read(self, clients: int, requests: int) -> float:
        """Have every client read so many answers, one after the other; returns how long all of it took."""
        prompts = self._random.integers(0, self._engine.manifest.vocab_size, (clients, requests, self._prompt))
        threads = [threading.Thread(target=self._client, args=(rows.tolist(),)) for rows in prompts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    def _client(self, prompts: list[list[int]]) -> None:
        params = SamplingParams(max_new_tokens=self._new, min_new_tokens=self._new)
        for prompt in prompts:
            began = last = time.perf_counter()
            for delta in self._engine.generate(Request(prompt, params=params)):
                now = time.perf_counter()
                if delta.tokens and last == began:
                    self.first.append(now - began)
                elif delta.tokens:  # several where this thread came late
                    self.between += [(now - last) / len(delta.tokens)] * len(delta.tokens)
                last = now if delta.tokens else last


def _bare_steps(runner: BatchRunner, rows: int, start: int, repeats: int = 24) -> Spread:
    """Seconds of a step of the graph alone, over the first slots. The engine must have nothing else to do."""
    slots = list(range(rows))
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        runner.step(slots, [1] * rows, [start] * rows)
        seconds.append(time.perf_counter() - began)
    for slot in slots:
        runner.release(slot)
    return Spread.of(seconds[2:])


def table(report: ServingReport) -> str:
    """For people."""
    lines = [
        f"{report.bundle}: {report.precision}, {report.slots} slots, prompts of {report.prompt_tokens} tokens, answers "
        f"of {report.new_tokens}, {report.requests_per_client} for each client",
        "clients    tok/s  over one  first token ms p50, p99   next token ms p50, p99   bare step ms  overhead",
    ]
    for load in report.loads:
        first, token = load.first_token_seconds, load.token_seconds
        step = "" if load.step_seconds is None else f"{1e3 * load.step_seconds.median:12.2f}"
        overhead = "" if load.overhead is None else f"{load.overhead:9.1%}"
        lines.append(
            f"{load.clients:7}  {load.tokens_per_second:7.1f}  "
            f"{load.tokens_per_second / report.loads[0].tokens_per_second:7.2f}x  "
            f"{1e3 * first.p50:11.1f} {1e3 * first.p99:11.1f}   {1e3 * token.p50:10.2f} {1e3 * token.p99:10.2f}   "
            f"{step:>12} {overhead:>9}"
        )
    return "\n".join(lines)
