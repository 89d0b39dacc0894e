"""The answers' file: lines are appended, and it says by itself what is answered.

An answer's id holds the number of the request's line, and digests of the bundle with its settings and of that line. So
a run that was killed goes on from the file alone, and notices where bundle or requests aren't the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from glm4runtime.contract import UserError
from glm4serve.lines import json_line

_ID = re.compile(r"batch_req_([1-9][0-9]{0,11})_([0-9a-f]{12})_([0-9a-f]{16})")
_SYNC_SECONDS = 5.0


def identity_of(*parts: str | bytes | int | None) -> str:
    """12 hexadecimal digits of what answers depend on beside their request."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class AnswersFile:
    """An answers' file of this process alone. Half a last line, of a run that was killed, is dropped."""

    def __init__(self, path: Path, identity: str) -> None:
        """Open, or begin. identity: :func:`identity_of`'s.

        Raises UserError where it can't be written, another process writes it, it holds what isn't an answer of ours, or
        answers of another identity.
        """
        self.path, self.identity = path, identity
        self.count = self.failed = 0
        self._digests = bytearray()  # 8 bytes a line of the requests' file; zeros where it isn't answered
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            if not path.is_file():
                raise UserError(f"{path}: exists and is not a regular file; name another with -o")
            self._lock()
            self._end = self._read()
            os.ftruncate(self._file, self._end)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def digest(self, number: int) -> str | None:
        """Of the request on that line, where it is answered."""
        kept = bytes(self._digests[8 * number : 8 * number + 8])
        return kept.hex() if any(kept) else None

    def id_of(self, number: int, digest: str) -> str:
        """The id of the answer to that line."""
        return f"batch_req_{number}_{self.identity}_{digest}"

    def append(self, answer: dict[str, Any]) -> None:
        """Write a line. Raises UserError where that can't be done; the file then ends with the one before."""
        data = json_line(answer).encode() + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            self._end += written
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); it holds {self.count} answers: make room, and the "
                "same command goes on from there"
            ) from None
        self._note(answer)

    def sync(self) -> None:
        """Have the disk hold what was written."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing it; wait for its end, or name another") from None

    def _read(self) -> int:
        """Note the answers; returns where the last whole line ends."""
        end = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._note(json.loads(line))
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise UserError(
                        f"{self.path}, line {number}: not an answer of `glm4export batch`; name another file with -o"
                    ) from None
                end += len(line)
        return end

    def _note(self, answer: dict[str, Any]) -> None:
        """Raises ValueError, TypeError or KeyError where it isn't one, UserError where it is another bundle's."""
        found = _ID.fullmatch(answer["id"])
        if found is None:
            raise ValueError
        number, identity, digest = int(found[1]), found[2], found[3]
        if identity != self.identity:
            raise UserError(
                f"{self.path} was made with another bundle, or another --name, --max-seq-len or --chat-template; give "
                "the same, or name another file with -o"
            )
        if len(self._digests) < 8 * number + 8:
            self._digests.extend(bytes(8 * number + 8 - len(self._digests)))
        if self.digest(number) is None:
            self.count += 1
            self.failed += failed(answer)
        self._digests[8 * number : 8 * number + 8] = bytes.fromhex(digest)


def failed(answer: dict[str, Any]) -> bool:
    """Whether the request got no answer but an error."""
    return answer["response"] is None or answer["response"]["status_code"] != 200
