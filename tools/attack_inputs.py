"""Mutated configs, weights with their index, and bundle manifests against what reads them: only UserError may come.

    python tools/attack_inputs.py --configs 5000 --files 2000 --manifests 5000
    python tools/attack_inputs.py --case configs/17

Each case is made from the seed and its number alone. A worker process runs them; what ends it, keeps it longer than
20 s or takes it past 2 GB is a finding, as is any exception but UserError, or a message that no terminal should get.
Exit status 1 on any finding.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from attacks.inputs import CASES, FAMILIES, prepare

OUTCOMES = ("accepted", "refused", "traceback", "hang", "death", "memory", "message")
MOST_SECONDS, MOST_MEGABYTES, MOST_LINES = 20, 2000, 40
GRAPHS = 40  # accepted configs whose graphs are compiled


def attack(family: str, folder: Path, seed: str, compiles: bool = False) -> tuple[str, str]:
    """Run one case: its outcome, and what to say of it."""
    from glm4export.terminal.errors import message_text
    from glm4runtime.contract import UserError

    try:
        return CASES[family](folder, seed, compiles), ""
    except UserError as error:
        text = message_text(str(error))
        lines = text.split("\n")
        if len(lines) > MOST_LINES or any(line and not line.isprintable() for line in lines) or "\n  forged" in text:
            return "message", text[:300]
        return "refused", text[:300]
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__} at {at.filename}:{at.lineno}: {str(error)[:200]}"


def work(connection: Connection) -> None:
    """The worker: warmed up, then case after case."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)

        connection.send("ready")
        while (case := connection.recv()) is not None:
            outcome, detail = attack(case[0], folder, case[1], case[2])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            connection.send((outcome, detail, peak))


class Worker:
    """A process that runs cases until one ends it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def run(self, family: str, seed: str, compiles: bool) -> tuple[str, str, int]:
        """Outcome, detail and peak memory in MB; the worker is gone after ``hang``, ``death`` and ``memory``."""
        self.connection.send((family, seed, compiles))
        if not self.connection.poll(MOST_SECONDS):
            self.end()
            return "hang", f"more than {MOST_SECONDS} s", 0
        try:
            outcome, detail, peak = self.connection.recv()
        except EOFError:
            self.end()
            return "death", f"exit status {self.process.exitcode}", 0
        if peak > MOST_MEGABYTES:
            self.end()
            return "memory", f"{peak} MB, {outcome}", peak
        return outcome, detail, peak

    def stop(self) -> None:
        """Let it end by itself."""
        self.connection.send(None)
        self.process.join()

    def end(self) -> None:
        """End it, whatever it's doing."""
        self.process.kill()
        self.process.join()


def run_family(family: str, count: int, seed: int) -> Counter[str]:
    """All cases of a family; prints what it found."""
    counts: Counter[str] = Counter()
    worker, compiled = Worker(), 0
    for number in range(count):
        case = f"{seed}/{family}/{number}"
        outcome, detail, peak = worker.run(family, case, False)
        counts["peak MB"] = max(counts["peak MB"], peak)
        if family == "configs" and outcome == "accepted" and compiled < GRAPHS:
            compiled += 1
            outcome, detail, _ = worker.run(family, case, True)
        counts[outcome] += 1
        if outcome not in ("accepted", "refused"):
            print(f"{family}/{number}: {outcome}: {detail}", file=sys.stderr, flush=True)
        if not worker.process.is_alive():
            worker = Worker()
    worker.stop()
    counts["compiled"] = compiled
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python tools/attack_inputs.py --configs 500 --files 200 --manifests 500 --seed 7",
    )
    for family, count in zip(FAMILIES, (5000, 2000, 5000), strict=True):
        parser.add_argument(f"--{family}", type=int, default=count, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--case", metavar="FAMILY/NUMBER", help="run this one alone, here, and show what comes of it")
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name))
            family = arguments.case.split("/")[0]
            print(CASES[family](Path(name), f"{arguments.seed}/{arguments.case}", False))
        return 0
    found = 0
    print(f"{'':<10}{'cases':>7}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES) + f"{'peak MB':>9}{'s':>7}")
    for family in FAMILIES:
        start, count = time.monotonic(), getattr(arguments, family)
        counts = run_family(family, count, arguments.seed) if count else Counter()
        found += sum(counts[outcome] for outcome in OUTCOMES[2:])
        cells = "".join(f"{counts[outcome]:>11}" for outcome in OUTCOMES)
        print(f"{family:<10}{count:>7}{cells}{counts['peak MB']:>9}{time.monotonic() - start:>7.0f}", flush=True)
        if counts["compiled"]:
            print(f"{'':<10}graphs of {counts['compiled']} accepted configs compiled")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
