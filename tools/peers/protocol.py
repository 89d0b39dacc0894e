"""One small protocol between a comparison and its workers: one JSON object a line, in over stdin, out over stdout.

Each peer lives in its own process, so that thread pools, memory and package versions don't meet, and blocks on a read
while another is measured. Requests: ``start`` (a prompt from an empty cache), ``decode`` (more tokens,
one by one), ``every`` (a whole window's logits), ``memory``; ``answer`` (many requests) of a ``peers.serving.Server``.

A name is ``KIND:VARIANT``; with ``@small-pages`` behind it the worker runs without huge pages, which all others ask
for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TOOLS = Path(__file__).resolve().parent.parent
Groups = Mapping[str, tuple[int, int]]  # "blocks", "head", "embedding": stored bytes and parameters
SMALL_PAGES = "@small-pages"
_HUGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
}  # asks for transparent huge pages; read when a process starts


class MissingPeer(Exception):
    """A peer whose packages aren't installed; the message names what is missing and the command that installs it."""


@contextmanager
def needs(remedy: str) -> Iterator[None]:
    """Around a peer's imports: a package that isn't there becomes a MissingPeer with ``remedy``."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed" if error.name else str(error)
        raise MissingPeer(f"{missing}; {remedy}") from None


class Engine(Protocol):
    """A model in memory with the cache of one sequence."""

    name: str  # runtime and version
    settings: str  # what was chosen for it, its defaults left out
    files_bytes: int
    groups: Groups  # empty where the peer's format doesn't tell

    def start(self, ids: np.ndarray) -> np.ndarray:
        """Forget everything, compute a prompt; the last token's logits [vocab]."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Append one token; its logits [vocab]."""
        ...

    def every(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every position of a prompt, [len(ids), vocab]."""
        ...


def versions(*packages: str) -> str:
    """``name version`` of installed packages. Raises MissingPeer with the command that installs them."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in packages)
    except PackageNotFoundError as error:
        raise MissingPeer(f"{error.name} is not installed; pip install {' '.join(packages)}") from None


def interpreters(choices: Sequence[str]) -> dict[str, str]:
    """``KIND=PATH`` options as a table: the Python that runs a kind of peer."""
    for choice in choices:
        if "=" not in choice:
            raise SystemExit(f"--python {choice}: not KIND=PATH, such as openvino=/tmp/venv/bin/python")
    return dict(choice.split("=", 1) for choice in choices)


def serve(prepare: Callable[[], Callable[[], Any]], *, only_prepare: bool = False) -> None:
    """Make the peer's files, open it (timed), and answer requests until stdin ends.

    Whatever else writes to stdout goes to stderr.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**fields: object) -> None:
        print(json.dumps(fields), file=replies)

    try:
        open_engine = prepare()
        if only_prepare:
            return reply(prepared=True)
        begin = time.perf_counter()
        engine = open_engine()
    except MissingPeer as error:
        return reply(missing=str(error))
    except Exception as error:  # whatever a peer raises is told to the comparison, which goes on without it
        return reply(error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - begin
    reply(
        name=engine.name,
        settings=engine.settings,
        seconds=seconds,
        files_bytes=engine.files_bytes,
        groups=dict(engine.groups),
    )
    for line in sys.stdin:
        try:
            reply(**_answer(engine, json.loads(line)))
        except Exception as error:
            reply(error=f"{type(error).__name__}: {error}")
    return None


def _answer(engine: Any, request: dict[str, Any]) -> dict[str, object]:
    """``engine``: an Engine, or a ``peers.serving.Server``."""
    if request["do"] == "memory":
        return memory()
    if request["do"] == "answer":
        begin = time.perf_counter()
        answers = engine.answer(request["prompts"], request["new_tokens"], request["at_once"])
        return {"seconds": time.perf_counter() - begin, "answers": [times.as_json() for times in answers]}
    ids = np.array(request["ids"], np.int64)
    begin = time.perf_counter()
    if request["do"] == "every":
        logits = engine.every(ids)
    elif request["do"] == "start":
        logits = engine.start(ids)
    else:
        for token in ids.tolist():
            logits = engine.step(token)
    seconds = time.perf_counter() - begin
    if "save" in request:
        np.save(request["save"], np.asarray(logits, np.float32))
    return {"seconds": seconds}


def memory() -> dict[str, object]:
    """This process's share of memory (PSS), and how much of what it allocated lies on huge pages; 0 without /proc."""
    path, sizes = Path("/proc/self/smaps_rollup"), {}
    if path.is_file():
        for line in path.read_text().splitlines()[1:]:
            name, size = line.split(":")
            sizes[name] = int(size.split()[0]) * 1024
    return {"pss_bytes": sizes.get("Pss", 0), "huge_bytes": sizes.get("AnonHugePages", 0)}


@dataclass
class Worker:
    """The comparison's end of one worker. ``told`` is what it said of itself when its model was ready."""

    spec: str
    process: subprocess.Popen[str]
    told: dict[str, Any]

    @classmethod
    def prepare(cls, specs: Sequence[str], pythons: Mapping[str, str], options: Sequence[str]) -> list[str]:
        """Make the peers' files, one peer after another in processes that end: making them takes far more memory.

        Returned are the peers that can be had; each other gets a line on stderr.
        """
        ready = []
        for spec in specs:
            worker = cls.open(spec, pythons, [*options, "--only-prepare"])
            if worker is not None:
                worker.close()
                ready.append(spec)
        return ready

    @classmethod
    def open_all(cls, specs: Sequence[str], pythons: Mapping[str, str], options: Sequence[str]) -> dict[str, Worker]:
        """Workers with their models in memory, by name; a peer that can't be had gets a line on stderr instead."""
        opened = {spec: cls.open(spec, pythons, options) for spec in cls.prepare(specs, pythons, options)}
        return {spec: worker for spec, worker in opened.items() if worker is not None}

    @classmethod
    def open(cls, spec: str, pythons: Mapping[str, str], options: Sequence[str]) -> Worker | None:
        """One worker that has said of itself what it is; None, and a line on stderr, where it can't be had."""
        paths = [str(TOOLS), *(str(TOOLS.parent / part) for part in ("", "graphs", "runtime"))]
        known = os.environ.get("PYTHONPATH")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, known] if known else paths)} | _HUGE_PAGES
        peer = spec.removesuffix(SMALL_PAGES)
        if peer != spec:
            del environment["GLIBC_TUNABLES"]
        command = [pythons.get(peer.partition(":")[0], sys.executable), "-m", "peers.worker", peer, *options]
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            print(f"{spec}: skipped: {error}", file=sys.stderr)
            return None
        worker = cls(spec, process, {})
        try:
            worker.told = worker._read()
        except RuntimeError as error:
            print(f"{spec}: skipped: {error}", file=sys.stderr)
            worker.close()
            return None
        return worker

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        """One request and its answer. Raises RuntimeError with the worker's own message."""
        assert self.process.stdin is not None
        print(json.dumps({"do": do, **fields}), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the worker and wait for its memory to be given back."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise RuntimeError(answer["missing"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer
