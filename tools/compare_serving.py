"""Many requests at once, beside llama.cpp's and OpenVINO GenAI's continuous batching on the same checkpoint.

    python tools/make_checkpoint.py out/slice --geometry glm-4-9b --layers 4
    glm4export build out/slice -o out/slice-int4 --precision int4 --head-bits 4 --prefill-precision int8 \\
        --max-seq-len 512
    python tools/compare_serving.py out/slice --bundle out/slice-int4 --report serving.md

Every runtime answers the same requests: prompts of random tokens, of lengths spread evenly over --lengths, and greedy
answers of --new-tokens. In each round they take turns (the order rotates), first with --at-once requests under way, the
next one asked as soon as one is answered, then with the first few requests one at a time. Only one of them computes at
a time; each waits in a process of its own. Tokens per second are those of all answers over the time from the first
request to the last token, prompts included; a first token counts from its request on.

A bundle is measured twice: as the engine answers by itself, and ``invariant``, where an answer is the same whatever
runs beside it, which no other runtime promises. Prefix caches are off everywhere. In a slice of a model the output head
counts for more than in the whole one, so everybody's has 4 bits.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from peers import frame
from peers.frame import PAUSE
from peers.protocol import Worker, interpreters
from peers.report import Samples

PEERS = ("llama.cpp:Q4_0-pure", "openvino:int4-all")
KINDS = ("glm4export", "glm4export-invariant")
Prompts = list[list[int]]


def requests(arguments: argparse.Namespace, vocab: int) -> Prompts:
    """Prompts in random order of length."""
    random = np.random.default_rng(0)
    lengths = np.linspace(*arguments.lengths, arguments.requests).round().astype(int)
    return [random.integers(0, vocab, length).tolist() for length in random.permutation(lengths)]


def measured(found: dict[str, object], at_once: int) -> dict[str, float]:
    """A run's numbers by their names in the report."""
    answers = [np.array(answer["after"]) for answer in found["answers"]]  # type: ignore[index, attr-defined]
    first = 1e3 * np.percentile([after[0] for after in answers], (50, 99))
    following = 1e3 * np.percentile(np.concatenate([np.diff(after) for after in answers]), (50, 99))
    tokens = sum(after.size for after in answers)
    return {
        f"{at_once} at once (tok/s)": tokens / float(found["seconds"]),  # type: ignore[arg-type]
        f"first token of {at_once}, p50 (ms)": first[0],
        f"first token of {at_once}, p99 (ms)": first[1],
        f"next token of {at_once}, p50 (ms)": following[0],
        f"next token of {at_once}, p99 (ms)": following[1],
    }


def measure(workers: dict[str, Worker], arguments: argparse.Namespace, prompts: Prompts) -> Samples:
    """All rounds; a line of progress for each on stderr."""
    samples: Samples = {}
    names = list(workers)
    for number in range(arguments.rounds):
        for offset in range(len(names)):
            spec = names[(number + offset) % len(names)]
            values: dict[str, float] = {}
            for at_once, some in ((arguments.at_once, prompts), (1, prompts[: arguments.alone])):
                found = workers[spec].ask("answer", prompts=some, new_tokens=arguments.new_tokens, at_once=at_once)
                values |= measured(found, at_once)
                time.sleep(PAUSE)
            many, one = (values[f"{at_once} at once (tok/s)"] for at_once in (arguments.at_once, 1))
            values[f"{arguments.at_once} at once over 1"] = many / one
            for name, value in values.items():
                samples.setdefault(name, {}).setdefault(spec, []).append(value)
        print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr, flush=True)
    return samples


def first_tokens_equal(workers: dict[str, Worker], arguments: argparse.Namespace, prompts: Prompts) -> dict[str, float]:
    """Warms everyone up; the share of prompts behind which a runtime's first token is the first runtime's."""
    firsts = {}
    for spec, worker in workers.items():
        found = worker.ask("answer", prompts=prompts, new_tokens=2, at_once=arguments.at_once)
        firsts[spec] = np.array([answer["tokens"][0] for answer in found["answers"]])
        time.sleep(PAUSE)
    wanted = next(iter(firsts.values()))
    return {spec: float((tokens == wanted).mean()) for spec, tokens in firsts.items()}


def parse() -> argparse.Namespace:
    parser = frame.parser(__doc__, PEERS, rounds=3)
    parser.add_argument("--requests", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--at-once", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--alone", type=int, default=3, help="requests one at a time (default: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs=2, default=[64, 256], metavar="N", help="of the shortest and longest prompt"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    arguments = parser.parse_args()
    counts = (arguments.requests, arguments.alone, arguments.rounds, *arguments.lengths, arguments.new_tokens - 1)
    if min(counts) < 1 or arguments.at_once < 2:
        parser.error("requests, alone, rounds and lengths are counts from 1 on, at-once and new-tokens from 2 on")
    return arguments


def main() -> None:
    arguments = parse()
    context = max(arguments.lengths) + arguments.new_tokens
    shared = frame.Frame(arguments, context=context, slots=arguments.at_once)
    bundles = [f"{kind}:{bundle.resolve()}" for bundle in arguments.bundle for kind in KINDS]
    workers = Worker.open_all([*bundles, *arguments.peers], interpreters(arguments.python), shared.options)
    if not workers:
        raise SystemExit("none of the runtimes can run here")
    prompts = requests(arguments, shared.vocabulary())
    equal = first_tokens_equal(workers, arguments, prompts)
    with shared.measuring(workers):
        samples = measure(workers, arguments, prompts)
    shared.finish(
        workers,
        bundles,
        samples,
        alike_by="first tokens equal to the first's",
        alike=equal,
        rounds=f"{arguments.rounds} rounds of {arguments.requests} requests",
        less_is_better=[row for row in samples if "token" in row],
    )


if __name__ == "__main__":
    main()
