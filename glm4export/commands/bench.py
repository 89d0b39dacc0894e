"""``glm4export bench``: speed and memory beside this machine's limits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm4export.commands.session_options import add_session_options, load_session
from glm4runtime.backends.providers import default_provider
from glm4runtime.contract import UserError

EXAMPLE = "example: glm4export bench glm4-demo-fp16 --prefill 128,512 --plot bench.png"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("--prefill", metavar="N,N", help="prompt lengths (default: 32,128,512,2048; what fits)")
    command.add_argument(
        "--decode-context",
        metavar="N,N",
        help="tokens in the cache before the timed steps (default: 16,512,2048; what fits)",
    )
    command.add_argument(
        "--batch",
        metavar="N,N",
        help="sequences decoded at once; beyond 1 at the shortest context (default: 1,2,4,8; for tensorrt, and "
        "over several devices, 1)",
    )
    command.add_argument(
        "--steps", type=int, default=32, metavar="N", help="decode steps per run (default: %(default)s)"
    )
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: %(default)s)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a roofline and length curves, .png or .svg")
    command.add_argument(
        "--engine",
        action="store_true",
        help="measure the engine: --batch clients that ask again and again, prompts of --prefill tokens, answers of "
        "--steps, --repeats of them for each client",
    )
    command.add_argument("--slots", type=int, metavar="N", help="with --engine: slots (default: as many as clients)")
    add_session_options(command)
    command.add_argument("--json", action="store_true", help="print all raw figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.bench import measure as bench
    from glm4export.bench import report as bench_report

    if arguments.engine:
        return _run_engine(arguments)
    if arguments.slots is not None:
        raise UserError("--slots goes with --engine")
    prefill = bench.numbers("--prefill", arguments.prefill)
    contexts = bench.numbers("--decode-context", arguments.decode_context)
    batches = bench.numbers("--batch", arguments.batch)
    if arguments.plot:
        from glm4export.bench import plot

        plot.check(arguments.plot)
    with load_session(arguments) as session:
        plan = bench.plan(
            session.runner.max_seq_len,
            prefill=prefill,
            contexts=contexts,
            batches=batches or ((1,) if bench.one_at_a_time(session) else bench.BATCHES),
            steps=arguments.steps,
            repeats=arguments.repeats,
        )
        provider = arguments.provider or default_provider(session.manifest)
        report = bench.bench(session, plan, provider=provider, threads=arguments.threads)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else bench_report.table(report))
    if arguments.plot:
        plot.write(report, arguments.plot)
    return 0


def _run_engine(arguments: argparse.Namespace) -> int:
    from glm4export.bench import serving
    from glm4export.bench.measure import numbers
    from glm4export.terminal import progress
    from glm4runtime import Engine

    for option, value in (("--decode-context", arguments.decode_context), ("--plot", arguments.plot)):
        if value is not None:
            raise UserError(f"{option} doesn't go with --engine")
    prompts = numbers("--prefill", arguments.prefill) or (serving.PROMPT,)
    if len(prompts) > 1:
        raise UserError("--prefill: with --engine all prompts have the same length, give one")
    clients = numbers("--batch", arguments.batch) or serving.CLIENTS
    engine = Engine.load(
        arguments.bundle,
        slots=arguments.slots or max(clients),
        provider=arguments.provider,
        threads=arguments.threads,
        max_seq_len=arguments.max_seq_len or prompts[0] + arguments.steps,
        device_id=arguments.device_id,
        gpu_mem_limit=arguments.gpu_mem_limit,
        cuda_graphs=arguments.cuda_graphs,
        invariant=arguments.invariant,
        prefix_cache="off",
    )
    with engine:
        report = serving.measure(
            engine,
            clients=clients,
            prompt_tokens=prompts[0],
            new_tokens=arguments.steps,
            requests=arguments.repeats,
            stage=progress.stage,
        )
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else serving.table(report))
    return 0
