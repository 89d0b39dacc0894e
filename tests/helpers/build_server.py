"""Builds in processes of their own that come to grief on request: ``python -m tests.helpers.build_server CHECKPOINT``.

It traces once, then forks for each job, so that a build that is killed costs a fraction of a second. A line of JSON on
standard input is a list of jobs that run at the same time; the answer is the list of their exit codes.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from glm4export import cli
from glm4export.build import build
from glm4export.bundle import folder as bundle_folder
from glm4export.bundle import swap
from glm4export.graph import trace
from glm4export.sources.config_json import read_config
from glm4export.terminal import progress
from glm4graphs.graphs import Graph
from glm4runtime.contract import Manifest, graph_names


def job(
    argv: list[str],
    stderr: str,
    point: str | None = None,
    signal_number: int = signal.SIGKILL,
    fsize: int | None = None,
) -> int:
    """One command line; at ``point`` the process sends itself a signal. ``fsize``: the largest file it may write."""
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    if fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    if point is not None:
        POINTS[point](functools.partial(os.kill, os.getpid(), signal_number))
    return cli.main(argv)


def at_weights(die: Callable[[], None]) -> None:
    progress.byte_bar = lambda total: die()  # type: ignore[assignment]


def amid_weights(die: Callable[[], None]) -> None:
    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def update(count: int) -> None:
            nonlocal done
            done += count
            if done > total / 2:
                die()

        yield update

    progress.byte_bar = bar  # type: ignore[assignment]


def amid_graph(die: Callable[[], None]) -> None:
    def save(model: Any, path: Path) -> None:
        path.write_bytes(b"half a graph")
        die()

    build.ir.save = save  # type: ignore[assignment]


def before_manifest(die: Callable[[], None]) -> None:
    Manifest.to_json = lambda self: die()  # type: ignore[assignment,method-assign,return-value]


def before_rename(die: Callable[[], None]) -> None:
    bundle_folder.swap = lambda scratch, out, check: die()  # type: ignore[assignment]


def after_rename(die: Callable[[], None]) -> None:
    def then_die(scratch: Path, out: Path, check: swap.Check) -> None:
        swap.swap(scratch, out, check)
        die()

    bundle_folder.swap = then_die  # type: ignore[assignment]


def amid_trace(die: Callable[[], None]) -> None:
    """Inside torch.export."""
    trace_again()
    forward = Graph.forward

    @functools.wraps(forward)
    def then_die(*arguments: Any, **named: Any) -> Any:
        die()
        return forward(*arguments, **named)

    Graph.forward = then_die  # type: ignore[method-assign]


def amid_translation(die: Callable[[], None]) -> None:
    """Inside torch.onnx, which goes on after errors of a translation to list them all."""
    trace_again()
    translate = trace._attention_node

    @functools.wraps(translate)
    def then_die(*arguments: Any, **named: Any) -> Any:
        die()
        return translate(*arguments, **named)

    trace._attention_node = then_die


def trace_again() -> None:
    build.trace = trace.trace


POINTS: dict[str, Callable[[Callable[[], None]], None]] = {
    "amid a trace": amid_trace,
    "amid a translation": amid_translation,
    "at the weights": at_weights,
    "amid the weights": amid_weights,
    "amid a graph": amid_graph,
    "before the manifest": before_manifest,
    "before the rename": before_rename,
    "after the rename": after_rename,
}


def _leave(job: Callable[..., int], arguments: dict[str, Any]) -> None:
    """Run the job as a process's main function, but skip the exit of libraries whose threads the fork left behind."""
    code = 70
    try:
        code = job(**arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    config = read_config(Path(sys.argv[1]) / "config.json")
    positions = config.max_position_embeddings
    traces = {
        name: trace.trace(config, name, dtype=torch.float32, max_seq_len=positions) for name in graph_names("cpu")
    }
    build.trace = lambda config, graph, **options: traces[graph].clone()
    print("ready", flush=True)
    for line in sys.stdin:
        children = []
        for arguments in json.loads(line):
            pid = os.fork()
            if not pid:
                _leave(job, arguments)
            children.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
