"""Kill builds and prepares at random moments, and build into all kinds of output paths: is a file lost?

    python tools/attack_files.py --kills 200 --processes 40

A kill is a signal, SIGHUP, SIGINT, SIGTERM or SIGKILL, sent after a random time. Most are sent to forks of this
process, which has torch imported already: to builds that trace, to builds whose graphs are traced (so that all the time
goes into writing), and to prepares. The others are sent to processes of their own. After each it is asked what
``glm4export`` promises: exit status 128 and the signal's number, or 0 where the work was done before; one line on
standard error, and no traceback; the earlier bundle whole, or the new one; no other file changed, and none left (after
SIGKILL: none left once the next build has begun). Then come the output paths. Exits with 1 where anything was found.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attacks.files import SIGNALS, Attack, Tally, finish, fork
from attacks.output_paths import output_paths

HANDLED = sum(1 << (number - 1) for number in SIGNALS[:3])  # as /proc/PID/status has them


def process_of_its_own(log: Path, folder: Path) -> Callable[[list[str]], int]:
    """Starts ``python -m glm4export``."""

    def start(argv: list[str]) -> int:
        with log.open("w") as output:
            command = [sys.executable, "-m", "glm4export", *argv]
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        process.returncode = 0  # waited for by its id
        return handling(process.pid)

    return start


def handling(process: int) -> int:
    """Wait until a process handles its signals, or ended: what comes before is Python's own start, or the fork's."""
    while True:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        if status["State"].strip().startswith("Z") or int(status["SigCgt"], 16) & HANDLED == HANDLED:
            return process
        time.sleep(0.001)


def kills(attack: Attack, count: int, processes: int) -> Iterator[tuple[str, Tally]]:
    """Kills of each kind, shown while they go on; ``processes`` of them of processes of their own."""

    def forked(argv: list[str]) -> int:
        attack.log.write_text("")
        return handling(fork(argv, attack.log, attack.root))

    own = process_of_its_own(attack.log, attack.root)
    forks = max(0, count - processes)
    kinds: list[tuple[str, int, Callable[[list[str]], int], bool, list[str] | None]] = [
        ("trace and write (forks)", forks // 3, forked, True, None),
        ("prepare (forks)", forks // 3, forked, False, None),
        ("write (forks, traced before)", forks - 2 * (forks // 3), forked, True, ["traced"]),
        ("build (processes)", processes - processes // 4, own, True, None),
        ("prepare (processes)", processes // 4, own, False, None),
    ]
    for name, tries, start, builds, traced in kinds:
        if traced:  # from here on forks inherit the traces
            keep_traces(attack)
        attack.lay_out(earlier=True)
        begun = time.monotonic()
        argv = attack.build(attack.checkpoints[1], attack.place / "out") if builds else ["prepare", "place/out"]
        assert finish(start(argv)) == 0, attack.log.read_text()
        longest, tally = time.monotonic() - begun, Tally()
        for index in range(tries):
            if sys.stderr.isatty():
                print(f"\r{name} {index + 1}/{tries}", end="", file=sys.stderr)
            (attack.kill_build if builds else attack.kill_prepare)(tally, start, longest)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        yield f"{name}, up to {longest:.1f} s", tally


def keep_traces(attack: Attack) -> None:
    """Trace in this process, without leaving a build, and have builds copy what that gave."""
    from glm4export.build import build
    from glm4export.build.options import BuildOptions
    from glm4export.sources.config_json import read_config
    from glm4runtime.contract import graph_names

    traced = functools.cache(build.trace)
    build.trace = lambda *arguments, **named: traced(*arguments, **named).clone()
    config = read_config(attack.checkpoints[1] / "config.json")
    for name in graph_names("cpu"):
        dtype = BuildOptions("fp32", "cpu").compute_dtype
        build.trace(config, name, dtype=dtype, max_seq_len=config.max_position_embeddings)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python tools/attack_files.py --kills 20 --processes 4 --seed 1",
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--processes", type=int, default=40, metavar="N", help="of the kills, in processes of their own (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments (default: %(default)s)")
    arguments = parser.parse_args()

    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)  # ignored under nohup and in a shell's background, and so by all here
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    findings = 0
    with tempfile.TemporaryDirectory() as root:
        attack = Attack(Path(os.path.realpath(root)), arguments.seed)
        print(f"{'attack':<48} {'tried':>5}  {'exit statuses':<40} findings")
        for made_by in (kills(attack, arguments.kills, arguments.processes), output_paths(attack)):
            for name, tally in made_by:
                codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.codes.items()))
                print(f"{name:<48} {tally.tried:>5}  {codes:<40} {len(tally.findings)}", flush=True)
                for finding in tally.findings:
                    print(f"    {finding}")
                findings += len(tally.findings)
    print(f"{findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
