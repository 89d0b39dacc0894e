"""The requests' file: its lines, and which of them are answered already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm4runtime.contract import UserError

if TYPE_CHECKING:
    from glm4serve.batch.answers import AnswersFile

MOST_BYTES = 32 << 20  # of a line: more isn't kept in memory


@dataclass(frozen=True)
class RequestLine:
    """A line that isn't blank. number: from 1. data: None where the line is longer than MOST_BYTES."""

    number: int
    data: bytes | None
    digest: str  # 16 hexadecimal digits of its sha256, line break and spaces around it left out


@dataclass(frozen=True)
class Left:
    """requests: all of them. answered: of these, and how many of those failed."""

    requests: int
    answered: int
    failed: int


def read_lines(path: Path) -> Iterator[RequestLine]:
    """All but blank ones. Raises UserError where the file can't be read."""
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MOST_BYTES + 1):
                number += 1
                if len(data) > MOST_BYTES and not data.endswith(b"\n"):
                    hashed = hashlib.sha256(data.lstrip())
                    while data and not data.endswith(b"\n"):
                        data = file.readline(1 << 20)
                        hashed.update(data)
                    yield RequestLine(number, None, hashed.hexdigest()[:16])
                elif data := data.strip():
                    yield RequestLine(number, data, hashlib.sha256(data).hexdigest()[:16])
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def compare(requests: Path, answers: AnswersFile) -> Left:
    """What is left to do. Raises UserError where an answer isn't to the request on its line."""
    count = known = 0
    for line in read_lines(requests):
        count += 1
        digest = answers.digest(line.number)
        if digest is None:
            continue
        known += 1
        if digest != line.digest:
            raise UserError(
                f"{answers.path} answers another request than {requests} has on line {line.number}: the file was "
                "changed, or is another one; give the former, or name other answers with -o"
            )
    if known < answers.count:
        raise UserError(
            f"{answers.path} has {answers.count} answers, and {requests} only {known} of their requests: lines were "
            "taken out, or it is another file; give the former, or name other answers with -o"
        )
    return Left(count, known, answers.failed)
