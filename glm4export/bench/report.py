"""The results of ``glm4export bench``: figures for programs, a table for people."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from glm4export.bench.limits import Limits
from glm4export.bench.workload import Workload
from glm4export.machine import Machine

_NOISY = 1.5  # slowest over fastest run of the same work, past which a reader is warned


@dataclass(frozen=True)
class Plan:
    """What to measure; lengths in tokens."""

    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]  # beyond 1 at the first context only
    steps: int
    repeats: int


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Iterable[float]) -> Spread:
        """Of at least one measurement, kept in order."""
        values = tuple(runs)
        return cls(statistics.median(values), min(values), max(values), values)


@dataclass(frozen=True)
class Prefill:
    """A prompt of so many tokens, through ``Session.generate``."""

    tokens: int
    seconds: Spread  # until the last token's logits are there
    tokens_per_second: Spread
    first_token_seconds: Spread  # until the first new token is chosen
    ops: int  # of the linears; a multiplication and an addition are two
    bytes: int
    arithmetic_percent: float | None  # of the peak of ``workload.prefill_arithmetic``


@dataclass(frozen=True)
class Decode:
    """Steps of ``batch`` sequences, each with ``context`` tokens before the first step; greedy.

    graph: the one that computed them: of those that are open, the fastest, since formats differ in what they do best at
    many rows.
    """

    batch: int
    context: int
    graph: str
    seconds_per_step: Spread  # a run is the mean of ``plan.steps`` steps
    tokens_per_second: Spread  # of all sequences together
    ops: int  # a step
    bytes: int  # a step: weights and cache
    bandwidth_percent: float | None


@dataclass(frozen=True)
class Report:
    """What ``glm4export bench`` measured. Limits are None where the bundle doesn't run on the CPU."""

    bundle: str
    precision: str
    cache_dtype: str
    provider: str
    threads: int  # 0: onnxruntime's choice
    max_seq_len: int
    onnxruntime: str
    plan: Plan
    machine: Machine
    limits: Limits | None
    workload: Workload
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    peak_rss_bytes: int  # of the process with one sequence, before batches and limits are measured
    pss_bytes: int
    anonymous_bytes: int
    huge_page_bytes: int  # of the anonymous ones

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)


def table(report: Report) -> str:
    """The report as text for a terminal."""
    machine, limits, work, plan = report.machine, report.limits, report.workload, report.plan
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    lines = [
        f"{report.bundle}: {report.precision} with a {report.cache_dtype} cache on {report.provider}, "
        f"{machine.cores} cores of {machine.cpu}{features}",
        f"medians of {plan.repeats} runs (lowest to highest); arithmetic is that of linears alone",
        "",
        f"{'prompt tokens':>15}{'tok/s':>9}{'':<20}{'first token':>12}{work.prefill_arithmetic + ' peak':>12}",
    ]
    for prompt in report.prefill:
        first = _time(prompt.first_token_seconds.median)
        lines.append(
            f"{prompt.tokens:>15}{_rates(prompt.tokens_per_second)}{first:>12}{_percent(prompt.arithmetic_percent):>12}"
        )
    lines += ["", f"{'batch × context':>15}{'tok/s':>9}{'':<20}{'a step':>12}{'bandwidth':>12}{'read a step':>13}"]
    for step in report.decode:
        name, seconds = f"{step.batch} × {step.context}", _time(step.seconds_per_step.median)
        percent, size = _percent(step.bandwidth_percent), f"{step.bytes / 1e6:.1f} MB"
        through = f"  by the {step.graph} graph" if step.graph != report.decode[0].graph else ""
        lines.append(f"{name:>15}{_rates(step.tokens_per_second)}{seconds:>12}{percent:>12}{size:>13}{through}")
    spreads = [run.seconds for run in report.prefill] + [run.seconds_per_step for run in report.decode]
    if (most := max(spread.high / spread.low for spread in spreads)) > _NOISY:
        lines += ["", f"noisy: runs of the same work took up to {most:.1f}x as long as others; is the machine busy?"]
    peak, proportional = report.peak_rss_bytes / 1e9, report.pss_bytes / 1e9
    lines += ["", f"memory   {peak:.2f} GB at most, {proportional:.2f} GB as a share (PSS), with one sequence"]
    share = 100 * report.huge_page_bytes / max(1, report.anonymous_bytes)
    lines.append(f"         {share:.0f}% of its own pages are huge ones (the kernel's setting: {machine.huge_pages})")
    if limits is None:
        return "\n".join([*lines, f"limits   measured on cpu only, not on {report.provider}"])
    read, int8, fp32 = limits.read_bytes_per_second, limits.int8_ops_per_second, limits.fp32_ops_per_second
    lines.append(
        f"limits   {read / 1e9:.1f} GB/s read, {int8 / 1e9:.0f} GOP/s int8, {fp32 / 1e9:.0f} GOP/s fp32, "
        "measured with all cores"
    )
    if machine.last_level_cache and work.decode.whole < machine.last_level_cache:
        lines.append(
            f"         the weights fit the last-level cache ({machine.last_level_cache >> 20} MiB): "
            "memory's bandwidth does not bound decoding here"
        )
    return "\n".join(lines)


def _rates(spread: Spread) -> str:
    between = f" ({_three(spread.low)} to {_three(spread.high)})"
    return f"{_three(spread.median):>9}{between:<20}"


def _three(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time(seconds: float) -> str:
    return f"{_three(seconds)} s" if seconds >= 1 else f"{_three(1e3 * seconds)} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%"
