"""Speed of bundles beside llama.cpp, OpenVINO and transformers on the same checkpoint, interleaved in one run.

    python tools/make_checkpoint.py out/slice --geometry glm-4-9b --layers 10
    glm4export build out/slice -o out/slice-int4 --precision int4 --head-bits 4 --max-seq-len 4096
    python tools/compare_peers.py out/slice --bundle out/slice-int4 --peers llama.cpp:Q4_0 openvino:int4 \\
        --report comparison.md

First every peer is opened alone, in turn, as often as --loads says: seconds to load (its packages imported before),
seconds of the first prompt behind it, of the shortest length, and its share of memory (PSS) then. With all of them
open, every round takes each length in turn, and at each length every peer in turn (the order rotates): a prefill of
that many tokens, then decode steps behind it. Only one peer computes at a time; each waits in a process of its own.
Printed are medians, and medians of the rounds' ratios, since machines are noisy. A peer whose packages are missing is
skipped with the command that installs them; files made for peers (GGUF, OpenVINO IR) stay in the work folder for the
next run.

Every peer runs at its best settings, which the report lists, and all of them ask for huge pages
(GLIBC_TUNABLES=glibc.malloc.hugetlb=1); ``llama.cpp:Q4_0@small-pages`` is the same peer without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peers import frame
from peers.frame import PAUSE
from peers.protocol import Worker, interpreters
from peers.report import Samples

LESS_IS_BETTER = ["load (s)", "first prompt (s)", "resident (GiB)"]
PEERS = ("llama.cpp:Q4_0", "llama.cpp:Q4_0-pure", "openvino:int4")


class Opener:
    """Opens workers for one checkpoint; ``specs`` are the peers that can be had, in order."""

    def __init__(self, specs: list[str], pythons: dict[str, str], options: list[str]) -> None:
        self._pythons, self._options = pythons, options
        self.specs = Worker.prepare(specs, pythons, options)

    def open(self, spec: str) -> Worker | None:
        """None where it fails; it isn't tried again."""
        worker = Worker.open(spec, self._pythons, self._options)
        if worker is None:
            self.specs.remove(spec)
        return worker


def measure_loading(opener: Opener, prompt: list[int], rounds: int) -> Samples:
    """Each peer alone: seconds to load, seconds of a first prompt, and memory behind it."""
    samples: Samples = {row: {} for row in LESS_IS_BETTER}
    for number in range(rounds):
        names = list(opener.specs)
        for offset in range(len(names)):
            spec = names[(number + offset) % len(names)]
            worker = opener.open(spec)
            if worker is None:
                continue
            first = worker.ask("start", ids=prompt)["seconds"]
            values = (worker.told["seconds"], first, worker.ask("memory")["pss_bytes"] / 2**30)
            worker.close()
            for row, value in zip(samples.values(), values, strict=True):
                row.setdefault(spec, []).append(value)
        print(f"loading {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return samples


def same_model(workers: dict[str, Worker], ids: list[int]) -> dict[str, float]:
    """Warms everyone up on one prompt; correlation of the last token's logits with the first peer's."""
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        for spec, worker in workers.items():
            path = str(Path(folder) / "logits.npy")
            worker.ask("start", ids=ids, save=path)
            worker.ask("decode", ids=ids[:4])
            logits[spec] = np.load(path)
            time.sleep(PAUSE)
    first = next(iter(logits.values()))
    return {spec: float(np.corrcoef(first, row)[0, 1]) for spec, row in logits.items()}


def measure_speed(workers: dict[str, Worker], arguments: argparse.Namespace, vocab: int) -> Samples:
    """Tokens per second of all rounds; a line of progress for each on stderr."""
    rng = np.random.default_rng(0)
    speeds: Samples = {}
    names = list(workers)
    for number in range(arguments.rounds):
        for length in arguments.lengths:
            prompt, answer = (rng.integers(0, vocab, count).tolist() for count in (length, arguments.steps))
            for offset in range(len(names)):
                spec = names[(number + offset) % len(names)]
                for work, request, ids in (
                    (f"prefill {length} (tok/s)", "start", prompt),
                    (f"decode at {length} (tok/s)", "decode", answer),
                ):
                    seconds = workers[spec].ask(request, ids=ids)["seconds"]
                    speeds.setdefault(work, {}).setdefault(spec, []).append(len(ids) / seconds)
                time.sleep(PAUSE)
        print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr, flush=True)
    return speeds


def parse() -> argparse.Namespace:
    parser = frame.parser(__doc__, PEERS, rounds=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048], help="default: 256 2048")
    parser.add_argument("--steps", type=int, default=32, help="decode steps at each length (default: %(default)s)")
    parser.add_argument("--loads", type=int, default=3, help="rounds of loading (default: %(default)s)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.loads, arguments.steps, *arguments.lengths) < 1:
        parser.error("rounds, loads, steps and lengths are counts from 1 on")
    return arguments


def main() -> None:
    arguments = parse()
    shared = frame.Frame(arguments, context=max(arguments.lengths) + arguments.steps)
    bundles = [f"glm4export:{bundle.resolve()}" for bundle in arguments.bundle]
    opener = Opener([*bundles, *arguments.peers], interpreters(arguments.python), shared.options)
    if not opener.specs:
        raise SystemExit("none of the peers can run here")
    vocab = shared.vocabulary()
    first = np.random.default_rng(1).integers(0, vocab, min(arguments.lengths)).tolist()
    samples = measure_loading(opener, first, arguments.loads)
    workers = {spec: worker for spec in list(opener.specs) if (worker := opener.open(spec))}
    if not workers:
        raise SystemExit("none of the peers can be opened here")
    agreement = same_model(workers, first[:64])
    with shared.measuring(workers):
        samples |= measure_speed(workers, arguments, vocab)
    shared.finish(
        workers,
        bundles,
        samples,
        alike_by="logits' correlation with the first",
        alike=agreement,
        rounds=f"{arguments.loads} rounds of loading and {arguments.rounds} of speed",
        less_is_better=LESS_IS_BETTER,
    )


if __name__ == "__main__":
    main()
