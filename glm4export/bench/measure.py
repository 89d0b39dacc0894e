"""Time a bundle: prefill, first token and decode, beside the limits of the machine it runs on."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnxruntime as ort

from glm4export.bench.limits import Limits, measure_limits
from glm4export.bench.report import Decode, Plan, Prefill, Report, Spread
from glm4export.bench.workload import Workload, workload
from glm4export.machine import describe, process_memory
from glm4runtime.backends.cache import Buffer
from glm4runtime.backends.held_row import HeldSteps
from glm4runtime.backends.lengths import lengths_of
from glm4runtime.backends.memory import memory_bytes
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.contract import (
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    PREFILL,
    STEP,
    Manifest,
    UserError,
    past_name,
    present_name,
)
from glm4runtime.sampling import Sampler, SamplingParams
from glm4runtime.session import Session

PROMPTS = (32, 128, 512, 2048)  # tokens
CONTEXTS = (16, 512, 2048)  # tokens in the cache before the steps that are timed
BATCHES = (1, 2, 4, 8)


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """``"512,128"`` as (128, 512); None stays None. Raises UserError naming the option."""
    if text is None:
        return None
    words = text.split(",")
    # isdecimal, not isdigit: int() refuses the likes of "²"
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{option} {text!r}: expected whole numbers of at least 1 with commas between, such as 128,512")
    return tuple(sorted({int(word) for word in words}))


def plan(
    max_seq_len: int,
    *,
    prefill: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    steps: int = 32,
    repeats: int = 5,
) -> Plan:
    """Check what was asked for against the cache; lengths left out are the usual ones, as far as they fit."""
    for option, value in (("--steps", steps), ("--repeats", repeats)):
        if value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    room = max_seq_len - steps
    if room < 1:
        raise UserError(f"--steps {steps}: the cache holds {max_seq_len} tokens; ask for fewer than that")
    for option, values, most in (("--prefill", prefill, max_seq_len), ("--decode-context", contexts, room)):
        if values and max(values) > most:
            beside = "" if most == max_seq_len else f" and {steps} of them are for --steps"
            raise UserError(
                f"{option} {max(values)}: the cache holds {max_seq_len} tokens{beside}; "
                f"ask for at most {most}, or build the bundle with a larger --max-seq-len"
            )
    return Plan(
        tuple(sorted({min(tokens, max_seq_len) for tokens in prefill or PROMPTS})),
        tuple(sorted({min(tokens, room) for tokens in contexts or CONTEXTS})),
        tuple(batches),
        steps,
        repeats,
    )


def one_at_a_time(session: Session) -> str | None:
    """Whose steps are measured with one sequence only; None where there may be more."""
    runner = session.runner
    if not isinstance(runner, OrtRunner):
        return f"bundles for {session.manifest.target} are measured"
    return "stages on several devices are measured" if len(runner.gpu.devices) > 1 else None


def bench(session: Session, what: Plan, *, provider: str, threads: int) -> Report:
    """Measure a session; its cache is overwritten. provider, threads: what it was loaded with.

    Raises UserError where memory is too short for the largest batch, or where one sequence at a time is all there is.
    """
    runner, manifest = session.runner, session.manifest
    if max(what.batches) > 1 and (why := one_at_a_time(session)):
        raise UserError(f"--batch {max(what.batches)}: {why} with one sequence; leave it out")
    _require_memory(manifest, max(what.batches), what.contexts[0] + what.steps)
    work = workload(session.folder, manifest, provider=provider, chunk=runner.prefill_chunk)
    ids = np.random.default_rng(0).integers(0, manifest.vocab_size, max(*what.prefill, *what.contexts)).tolist()
    prefills = {tokens: _time_prefill(session, ids[:tokens], what.repeats) for tokens in what.prefill}
    runner.rewind()
    steps: dict[tuple[int, int], list[float]] = {}
    through: dict[tuple[int, int], str] = {}  # the graph that computed
    for context in what.contexts:
        _note(f"decode at {context} tokens")
        runner.prefill(ids[runner.length : context])
        steps[1, context] = _time_steps(_one_sequence(session), partial(runner.rewind, context), what)
        through[1, context] = runner.step_graph if isinstance(runner, OrtRunner) else STEP
        runner.rewind(context)
    memory = process_memory()
    for batch in what.batches:
        if batch > 1 and isinstance(runner, OrtRunner):
            context = what.contexts[0]
            _note(f"decode of {batch} sequences at {context} tokens")
            rows = BatchDecoder(runner, batch, context + what.steps)
            runs = {}
            for graph in runner.graphs:
                rows.use(graph)
                runs[graph] = _time_steps(rows.step, partial(rows.rewind, context), what)
            graph = min(runs, key=lambda graph: statistics.median(runs[graph]))
            steps[batch, context], through[batch, context] = runs[graph], graph
            del rows
    _note("limits of this machine")
    limits = measure_limits() if provider == "cpu" else None
    _note("")
    return Report(
        bundle=str(session.folder),
        precision=manifest.precision,
        cache_dtype=manifest.cache.dtype,
        provider=provider,
        threads=threads,
        max_seq_len=runner.max_seq_len,
        onnxruntime=ort.__version__,
        plan=what,
        machine=describe(),
        limits=limits,
        workload=work,
        prefill=tuple(_prefill(tokens, *runs, work, limits) for tokens, runs in prefills.items()),
        decode=tuple(_decode(*at, through[at], runs, work, limits) for at, runs in sorted(steps.items())),
        **dataclasses.asdict(memory),
    )


class BatchDecoder:
    """Greedy steps of several sequences of one length, each with its own cache.

    Any graph that the runner has open computes them. The cache holds ones instead of a text's keys and values, which
    takes as long.
    """

    def __init__(self, runner: OrtRunner, batch: int, capacity: int) -> None:
        """capacity: tokens of every sequence that there is room for."""
        spec, vocab, place = runner.manifest.cache, runner.manifest.vocab_size, runner.place
        self.length = 0
        shape = (batch, spec.kv_heads, capacity, spec.head_dim)
        ones = np.ones(shape, spec.dtype)  # written out: zero pages that were never written aren't read from memory
        names = [(layer, part) for layer in range(spec.layers) for part in ("key", "value")]
        self._cache = {name: Buffer(shape, spec.dtype, *place) for name in names}
        for buffer in self._cache.values():
            buffer.write(ones)
        self._batch, self._tokens = batch, Buffer((batch, 1), "int64", *place)
        self._lengths = lengths_of(runner.manifest.first(runner.step_graph), batch, capacity, *place)
        self._logits = Buffer((batch, 1, vocab), "float32", "cpu")
        self._first = Buffer((batch, 1), "int64", *place)
        self._first.write(np.zeros((batch, 1), np.int64))
        self._graphs = runner.graphs
        self.use(runner.step_graph)

    def use(self, graph: str) -> None:
        """Compute with the graph of that name from now on."""
        self._graph = self._graphs[graph]
        self._binding = self._graph.io_binding()
        for (layer, part), buffer in self._cache.items():
            buffer.bind_input(self._binding, past_name(layer, part))
            buffer.bind_output(self._binding, present_name(layer, part))
        self._tokens.bind_input(self._binding, INPUT_IDS)
        self._logits.bind_output(self._binding, LOGITS)
        if graph == PREFILL:
            self._first.bind_input(self._binding, LOGIT_ROWS)
        self._lengths.bind(self._binding, self._batch)

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens of every sequence."""
        self.length = length

    def step(self) -> None:
        """Append a token to every sequence."""
        self.length += 1
        self._lengths.tell(self._binding, [self.length] * self._batch, self.length)
        self._graph.run_with_iobinding(self._binding)
        self._tokens.write(self._logits.array.argmax(axis=-1))


def _require_memory(manifest: Manifest, batch: int, capacity: int) -> None:
    row = capacity * manifest.cache.bytes_per_token + 4 * manifest.vocab_size  # cache and logits
    available = memory_bytes()[1]
    if batch * row > available:
        raise UserError(
            f"--batch {batch}: {batch} sequences of {capacity} tokens take {batch * row / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are free; ask for fewer sequences or a shorter --decode-context"
        )


def _time_prefill(session: Session, ids: list[int], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds until the prompt's logits are there, and until the first token is chosen, of every repeat."""
    params = SamplingParams(max_new_tokens=1)
    ready, chosen = [], []
    for repeat in range(repeats + 1):
        _note(f"prefill of {len(ids)} tokens, {repeat or 'warm-up'} of {repeats}")
        session.runner.rewind()  # what is in the cache isn't computed again
        start = time.perf_counter()
        generation = session.generate(ids, params)
        ready.append(time.perf_counter() - start)
        next(generation, None)  # none where the first token is a stop token
        chosen.append(time.perf_counter() - start)
    return ready[1:], chosen[1:]


def _one_sequence(session: Session) -> Callable[[], None]:
    """A greedy step as the generation loop takes it."""
    runner, sampler, token = session.runner, Sampler(SamplingParams(), session.manifest.vocab_size), 0
    steps = HeldSteps(runner) if sampler.chooses_among(runner.top_count) else runner

    def step() -> None:
        nonlocal token
        token = sampler(steps.decode(token))

    return step


def _time_steps(step: Callable[[], None], rewind: Callable[[], None], what: Plan) -> list[float]:
    """Seconds a step of every repeat, the mean of its steps, after one repeat to warm up."""
    means = []
    for _ in range(what.repeats + 1):
        rewind()
        start = time.perf_counter()
        for _ in range(what.steps):
            step()
        means.append((time.perf_counter() - start) / what.steps)
    return means[1:]


def _prefill(tokens: int, ready: list[float], chosen: list[float], work: Workload, limits: Limits | None) -> Prefill:
    seconds, ops = Spread.of(ready), work.prefill_ops(tokens)
    peak = limits.ops_per_second(work.prefill_arithmetic) if limits else None
    return Prefill(
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=Spread.of(tokens / run for run in ready),
        first_token_seconds=Spread.of(chosen),
        ops=ops,
        bytes=work.prefill_bytes(tokens),
        arithmetic_percent=100 * ops / seconds.median / peak if peak else None,
    )


def _decode(batch: int, context: int, graph: str, runs: list[float], work: Workload, limits: Limits | None) -> Decode:
    seconds, size = Spread.of(runs), work.decode_bytes(batch, context, graph)
    return Decode(
        batch=batch,
        context=context,
        graph=graph,
        seconds_per_step=seconds,
        tokens_per_second=Spread.of(batch / run for run in runs),
        ops=work.decode_ops(batch),
        bytes=size,
        bandwidth_percent=100 * size / seconds.median / limits.read_bytes_per_second if limits else None,
    )


def _note(what: str) -> None:
    """Say on a terminal what is being measured; an empty text takes the line away."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K  {what} …" if what else "\r\x1b[K", end="", file=sys.stderr, flush=True)
