"""What `embed` and `classify` share: texts from a file or standard input, results as lines of JSON, progress."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from glm4export.commands.session_options import add_gpu_options
from glm4runtime import signals
from glm4runtime.backends.settings import PROVIDERS
from glm4runtime.contract import UserError, shown

if TYPE_CHECKING:
    from glm4runtime.encoder import Encoder, Text

WINDOW = 1024  # texts that are read, ordered by length, computed and written at a time


def add_text_options(command: argparse.ArgumentParser) -> None:
    """Options of both commands."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument(
        "file", nargs="?", default="-", metavar="FILE", help="a text per line, or with --jsonl JSON (default: stdin)"
    )
    command.add_argument(
        "--jsonl",
        action="store_true",
        help="each line is a JSON string, a list of token ids, or an object with one of them (default for FILE.jsonl)",
    )
    command.add_argument("--field", default="text", metavar="NAME", help="of the object, default: %(default)s")
    command.add_argument("--provider", choices=PROVIDERS, help="default: the bundle's target")
    add_gpu_options(command)
    command.add_argument("--threads", type=int, default=0, metavar="N", help="default: 0, onnxruntime chooses")
    command.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of a text (default: the bundle's)")
    command.add_argument("--truncate", action="store_true", help="cut longer texts at their end")
    command.add_argument(
        "--batch-tokens", type=int, default=2048, metavar="N", help="computed in one run (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="with -o: print the summary as JSON")
    command.set_defaults(opens_session=True)


def open_encoder(arguments: argparse.Namespace) -> Encoder:
    """Open the bundle as the options say, once it's clear that results can go where they are to go."""
    from glm4runtime import load_encoder

    _check_output(arguments.output, arguments.file)
    return load_encoder(
        arguments.bundle,
        provider=arguments.provider,
        threads=arguments.threads,
        max_seq_len=arguments.max_seq_len,
        batch_tokens=arguments.batch_tokens,
        truncate=arguments.truncate,
        device_id=arguments.device_id,
        gpu_mem_limit=arguments.gpu_mem_limit,
    )


def _check_output(output: Path | None, file: str) -> None:
    """Raise UserError where results would take the place of what is no result, before minutes are spent on them."""
    if output is None or not output.exists():
        return
    if not output.is_file():
        raise UserError(f"{output}: exists and is not a regular file; name another with -o, or leave it out")
    if file != "-" and Path(file).exists() and output.samefile(file):
        raise UserError(f"{output}: holds the texts, and results would replace them; name another with -o")


def windows(arguments: argparse.Namespace) -> Iterator[tuple[int, list[Text]]]:
    """WINDOW texts at a time, with the first one's line number. Raises UserError naming the line that is no text."""
    name = "standard input" if arguments.file == "-" else arguments.file
    with _open(arguments.file) as lines:
        jsonl = arguments.jsonl or name.endswith(".jsonl")
        texts = (
            _from_json(line, f"{name}, line {number}", arguments.field) if jsonl else line.rstrip("\r\n")
            for number, line in enumerate(lines, 1)
        )
        for first in count(1, WINDOW):
            try:
                window = list(islice(texts, WINDOW))
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: not valid {error.encoding}: {error.reason}") from None
            if not window:
                return
            for index, text in enumerate(window, first):
                if not text:
                    raise UserError(f"{name}, line {index}: empty; each line needs a text")
            yield first, window


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place when the block ends well; nothing is left when it doesn't. A link stays one."""
    place = path.resolve()
    try:
        descriptor, scratch = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def remove() -> None:
        with suppress(FileNotFoundError):
            Path(scratch).unlink()

    with signals.undone(remove), os.fdopen(descriptor, "wb") as file:
        try:
            yield file
            file.flush()
            umask = os.umask(0)
            os.umask(umask)
            Path(scratch).chmod(0o666 & ~umask)
            Path(scratch).replace(place)
        except BaseException:
            remove()
            raise


@contextmanager
def json_lines(output: Path | None) -> Iterator[Any]:
    """A function that writes an object as a line, to a new file or standard output."""
    if output is None:
        yield lambda value: print(json.dumps(value, ensure_ascii=False))
        return
    with new_file(output) as file:
        yield lambda value: file.write(f"{json.dumps(value, ensure_ascii=False)}\n".encode())


@contextmanager
def counted() -> Iterator[Any]:
    """On a terminal, a line with how many texts are done; a function that is told of more."""
    done, show = 0, sys.stderr.isatty()

    def more(texts: int) -> None:
        nonlocal done
        done += texts
        if show:
            print(f"\r  {done} texts", end="", file=sys.stderr, flush=True)

    try:
        yield more
    finally:
        if show and done:
            print(file=sys.stderr)


def summary(arguments: argparse.Namespace, texts: int, words: str) -> None:
    """With -o: what was written."""
    if arguments.output is None:
        return
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "texts": texts}))
    else:
        print(f"{arguments.output}: {words}")


@contextmanager
def _open(file: str) -> Iterator[IO[str]]:
    if file == "-":
        yield sys.stdin
        return
    try:
        opened = Path(file).open(encoding="utf-8")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    with opened:
        yield opened


def _from_json(line: str, where: str, field: str) -> Text:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if isinstance(value, dict):
        if field not in value:
            raise UserError(f"{where}: no {field!r} among {shown(sorted(value))}; name another with --field")
        value = value[field]
    if isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value)):
        text: str | Sequence[int] = value
        return text
    raise UserError(f"{where}: {shown(value)} is neither a text nor a list of token ids")
