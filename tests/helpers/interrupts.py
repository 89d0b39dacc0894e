"""Ctrl-C at any line of the runtime's own code."""

from __future__ import annotations

import sys
from typing import Any


class Interrupt:
    """Raises KeyboardInterrupt at one line of the runtime's own code, while it is entered."""

    def __init__(self, at: int) -> None:
        self.lines, self._at = 0, at

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        # not at the line behind the one that was interrupted: a second Ctrl-C within microseconds is not meant
        return self._line if "glm4runtime" in frame.f_code.co_filename else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._at:
                raise KeyboardInterrupt
        return self._line
