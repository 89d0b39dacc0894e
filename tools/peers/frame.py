"""What every comparison beside other runtimes has: its options, other processes' share of the machine, its report."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers.machine import Machine, cpu_seconds, machine
from peers.protocol import Worker
from peers.report import Comparison, Samples, markdown, text

PAUSE = 0.3  # seconds between peers, for spinning threads to fall asleep


def parser(description: str | None, peers: Sequence[str], *, rounds: int) -> argparse.ArgumentParser:
    """The options that all have; peers, rounds: the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, nargs="*", default=[], help="bundles built from the checkpoint")
    parser.add_argument("--peers", nargs="*", default=peers, metavar="PEER", help=f"default: {' '.join(peers)}")
    parser.add_argument("--work", type=Path, help="folder for peers' files (default: CHECKPOINT-peers)")
    parser.add_argument("--rounds", type=int, default=rounds, help="of speed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="KIND=PATH", help="another interpreter for a kind of peer"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write machine, settings and tables as Markdown")
    return parser


class Frame:
    """One comparison, from its options to its report."""

    def __init__(self, arguments: argparse.Namespace, *, context: int, slots: int = 0) -> None:
        """context: tokens of a prompt and its answer, at most. slots: requests at once; 0: one sequence."""
        self._arguments = arguments
        checkpoint = arguments.checkpoint
        work = (arguments.work or checkpoint.with_name(checkpoint.name + "-peers")).resolve()
        self.options = ["--checkpoint", str(checkpoint.resolve()), "--work", str(work)]
        self.options += ["--threads", str(arguments.threads), "--context", str(context), "--slots", str(slots)]
        self._machine: Machine = machine(arguments.threads)
        self._cores_busy = 0.0
        print(self._machine.describe())

    def vocabulary(self) -> int:
        """Of the checkpoint."""
        config = json.loads((self._arguments.checkpoint / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"])

    @contextmanager
    def measuring(self, workers: dict[str, Worker]) -> Iterator[None]:
        """What is measured inside it is called into question where other processes keep cores busy meanwhile."""
        began, before = time.perf_counter(), _spent_elsewhere(workers)
        yield
        self._cores_busy = (_spent_elsewhere(workers) - before) / (time.perf_counter() - began)

    def finish(self, workers: dict[str, Worker], bundles: Sequence[str], samples: Samples, **found: Any) -> None:
        """Close the workers, print the tables, write the files. found: what :class:`Comparison` has beside."""
        comparison = Comparison(
            command=shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            machine=self._machine,
            other_cores_busy=self._cores_busy,
            bundles=[spec for spec in bundles if spec in workers],
            peers={spec: worker.told | worker.ask("memory") for spec, worker in workers.items()},
            samples={row: {spec: values[spec] for spec in workers} for row, values in samples.items()},
            **found,
        )
        for worker in workers.values():
            worker.close()
        print("\n" + text(comparison))
        if self._arguments.json:
            self._arguments.json.write_text(json.dumps(comparison.as_json(), indent=2), encoding="utf-8")
        if self._arguments.report:
            self._arguments.report.write_text(markdown(comparison), encoding="utf-8")


def _spent_elsewhere(workers: dict[str, Worker]) -> float:
    """CPU seconds so far of everything but the peers."""
    return cpu_seconds() - sum(cpu_seconds(worker.process.pid) for worker in workers.values())
