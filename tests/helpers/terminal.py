"""A command on a terminal of its own: what is typed, and what comes."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from types import TracebackType


class Terminal:
    """Runs a command whose standard streams are a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self._ours, theirs = pty.openpty()
        self.text = ""
        # A session of its own, whose terminal this is: Ctrl-C is then a signal.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._ours)  # hangs up
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(20)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """What comes up to a pattern's end; it isn't waited for again."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.text)) is None:
            assert time.monotonic() < end, f"{pattern!r} didn't come: {self.text[-2000:]!r}"
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self.text += os.read(self._ours, 1 << 16).decode(errors="replace")
                except OSError:  # the last one that had it is gone
                    assert re.search(pattern, self.text), f"{pattern!r} didn't come: {self.text[-2000:]!r}"
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before
