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
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peers.machine import cpu_seconds, machine
from peers.protocol import Worker, interpreters
from peers.report import Comparison, Samples, markdown, text

LESS_IS_BETTER = ["load (s)", "first prompt (s)", "resident (GiB)"]
PEERS = ("llama.cpp:Q4_0", "llama.cpp:Q4_0-pure", "openvino:int4")
PAUSE = 0.3  # seconds between peers, for spinning threads to fall asleep


class Opener:
    """Opens workers for one checkpoint; ``specs`` are the peers that can be had, in order."""

    def __init__(self, specs: list[str], arguments: argparse.Namespace, work: Path) -> None:
        context = max(arguments.lengths) + arguments.steps
        self._options = ["--checkpoint", str(arguments.checkpoint.resolve()), "--work", str(work)]
        self._options += ["--threads", str(arguments.threads), "--context", str(context)]
        self._pythons = interpreters(arguments.python)
        self.specs = Worker.prepare(specs, self._pythons, self._options)

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


def vocabulary(checkpoint: Path) -> int:
    """The checkpoint's vocab_size."""
    return int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])


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


def spent_elsewhere(workers: dict[str, Worker]) -> float:
    """CPU seconds so far of everything but the peers."""
    return cpu_seconds() - sum(cpu_seconds(worker.process.pid) for worker in workers.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, nargs="*", default=[], help="bundles built from the checkpoint")
    parser.add_argument("--peers", nargs="*", default=PEERS, metavar="PEER", help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--work", type=Path, help="folder for peers' files (default: CHECKPOINT-peers)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048], help="default: 256 2048")
    parser.add_argument("--steps", type=int, default=32, help="decode steps at each length (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of speed (default: %(default)s)")
    parser.add_argument("--loads", type=int, default=3, help="rounds of loading (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="KIND=PATH", help="another interpreter for a kind of peer"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write machine, settings and tables as Markdown")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.loads, arguments.steps, *arguments.lengths) < 1:
        parser.error("rounds, loads, steps and lengths are counts from 1 on")
    return arguments


def main() -> None:
    arguments = parse()
    work = (arguments.work or arguments.checkpoint.with_name(arguments.checkpoint.name + "-peers")).resolve()
    facts = machine(arguments.threads)
    print(facts.describe())
    bundles = [f"glm4export:{bundle.resolve()}" for bundle in arguments.bundle]
    opener = Opener([*bundles, *arguments.peers], arguments, work)
    if not opener.specs:
        raise SystemExit("none of the peers can run here")
    vocab = vocabulary(arguments.checkpoint)
    first = np.random.default_rng(1).integers(0, vocab, min(arguments.lengths)).tolist()
    samples = measure_loading(opener, first, arguments.loads)
    workers = {spec: worker for spec in list(opener.specs) if (worker := opener.open(spec))}
    if not workers:
        raise SystemExit("none of the peers can be opened here")
    agreement = same_model(workers, first[:64])
    begin, busy = time.perf_counter(), spent_elsewhere(workers)
    samples |= measure_speed(workers, arguments, vocab)
    cores_busy = (spent_elsewhere(workers) - busy) / (time.perf_counter() - begin)
    found = Comparison(
        command=shlex.join(["python", "tools/compare_peers.py", *sys.argv[1:]]),
        machine=facts,
        other_cores_busy=cores_busy,
        bundles=[spec for spec in bundles if spec in workers],
        peers={spec: worker.told | worker.ask("memory") for spec, worker in workers.items()},
        alike_by="logits' correlation with the first",
        alike=agreement,
        rounds=f"{arguments.loads} rounds of loading and {arguments.rounds} of speed",
        less_is_better=LESS_IS_BETTER,
        samples={row: {spec: values[spec] for spec in workers} for row, values in samples.items()},
    )
    for worker in workers.values():
        worker.close()
    print("\n" + text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found.as_json(), indent=2), encoding="utf-8")
    if arguments.report:
        arguments.report.write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
