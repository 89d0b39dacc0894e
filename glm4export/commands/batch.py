"""``glm4export batch``: a file of requests in OpenAI's batch format, answered without a server."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glm4export.commands.slot_options import (
    adapter_files,
    add_slot_options,
    answering_manifest,
    check_text_options,
    open_slots,
)
from glm4runtime import signals
from glm4runtime.backends.providers import default_provider
from glm4runtime.contract import AdapterFile, UserError, read_manifest

if TYPE_CHECKING:
    from glm4serve.batch import AnswersFile, Left, Progress

EXAMPLE = "example: glm4export batch glm-4-9b-int4 requests.jsonl -o answers.jsonl --slots 16"

_AT_ONCE = 2  # requests for each slot: while one is answered, the next one is made ready
_STALL_MS = 60e3  # nobody reads along: prompts run in full chunks
_MAX_QUEUE = 1 << 20  # sequences: a request may have 128 prompts with 64 answers each


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("requests", type=Path, metavar="REQUESTS", help="lines of JSON: custom_id, method, url, body")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="ANSWERS",
        help="lines are appended; where it has answers already, only the others are computed",
    )
    command.add_argument(
        "--unordered", action="store_true", help="write answers as they come, not in the requests' order"
    )
    command.add_argument("--name", metavar="NAME", help="the model that requests name (default: the folder's name)")
    add_slot_options(command)
    command.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 1 where a request failed."""
    from glm4serve.batch import AnswersFile, Progress, compare, identity_of

    manifest = answering_manifest(arguments.bundle)
    requests, output, template = arguments.requests, arguments.output, arguments.chat_template
    name = arguments.name or arguments.bundle.resolve().name
    if not requests.is_file():
        raise UserError(f"{requests}: {'not a regular file' if requests.exists() else 'no such file'}")
    if output.exists() and output.samefile(requests):
        raise UserError(f"{output}: holds the requests; name another file with -o")
    adapters = adapter_files(arguments, {name: arguments.bundle})[name]
    check_text_options(arguments, {name: arguments.bundle})
    identity = identity_of(
        manifest.to_json(),
        name,
        arguments.max_seq_len,
        None if template is None else _bytes(template),
        # Each of these changes the last bits of logits, and so perhaps a token
        arguments.provider or default_provider(manifest),
        arguments.no_invariant,
        arguments.cuda_graphs,
        arguments.prefix_cache,
        None if arguments.draft is None else read_manifest(arguments.draft).to_json(),
        *(f"{adapter}\0{AdapterFile.read(file).sha256}" for adapter, file in adapters.items()),
    )
    with AnswersFile(output, identity) as answers:
        left, done = compare(requests, answers), Progress()
        start = time.monotonic()
        if left.answered < left.requests:
            with signals.undone(lambda: _tell_of(answers, left)):
                done = _answer(arguments, name, adapters, answers, left)
        _summary(arguments, left, done, time.monotonic() - start)
        return 1 if answers.failed else 0


def _answer(
    arguments: argparse.Namespace, name: str, adapters: Mapping[str, Path], answers: AnswersFile, left: Left
) -> Progress:
    from glm4serve.batch import answer_all
    from glm4serve.models import Models

    with (
        open_slots(arguments.bundle, arguments, adapters=adapters, max_queue=_MAX_QUEUE, stall_ms=_STALL_MS) as model,
        _Line(left) as line,
    ):
        return answer_all(
            arguments.requests,
            answers,
            Models({name: model}, queue=0),
            at_once=_AT_ONCE * arguments.slots,
            ordered=not arguments.unordered,
            told=line,
        )


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def _tell_of(answers: AnswersFile, left: Left) -> None:
    """In a signal's handler."""
    line = f"\n{answers.path}: {answers.count} of {left.requests} answers; the same command goes on from there"
    os.write(2, f"{line}\n".encode())


class _Line:
    """On a terminal, a line with what is done; nothing in logs."""

    def __init__(self, left: Left) -> None:
        self._left, self._shows = left, sys.stderr.isatty()
        self._start, self._last, self._shown = time.monotonic(), 0.0, False

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)

    def __call__(self, done: Progress) -> None:
        now, left = time.monotonic(), self._left
        answered = left.answered + done.answered
        if not self._shows or (now - self._last < 0.2 and answered < left.requests):
            return
        self._last, self._shown = now, True
        seconds = max(now - self._start, 1e-9)
        rest = seconds / done.answered * (left.requests - answered)
        failed = f", {left.failed + done.failed} failed" if left.failed + done.failed else ""
        rate = (done.prompt_tokens + done.completion_tokens) / seconds
        text = f"  {answered} of {left.requests} requests{failed}, {rate:.1f} tokens/s, {_clock(rest)} left"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _summary(arguments: argparse.Namespace, left: Left, done: Progress, seconds: float) -> None:
    failed = left.failed + done.failed
    if arguments.json:
        facts = {
            "output": str(arguments.output),
            "requests": left.requests,
            "failed": failed,
            "answered_before": left.answered,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(facts))
        return
    before = f", {left.answered} of them from before" if left.answered else ""
    print(
        f"{arguments.output}: {left.requests} answers{before}, {failed} failed; "
        f"{done.prompt_tokens} prompt tokens and {done.completion_tokens} more in {seconds:.1f} s"
    )
