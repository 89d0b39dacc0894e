"""What a request failed with, as its reader is told it."""

from __future__ import annotations

import contextlib
from types import FrameType

from glm4runtime.contract import UserError
from glm4runtime.engine.handle import RequestFailed


def failure(what: str, error: BaseException) -> RequestFailed:
    """The error for readers, with ``error`` as its cause. what: failed, such as "the request failed"."""
    failed = RequestFailed(f"{what}: {told(error)}")
    failed.__cause__ = error
    _forget_values(error)
    return failed


def told(error: BaseException) -> str:
    """An error in one line: a UserError's own words, others with their type."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).splitlines() or ["no message"]  # MemoryError has none
    return f"{type(error).__name__}: {lines[0]:.300}"


def _forget_values(error: BaseException) -> None:
    """Keep the places in an error's traceback and drop what variables held there.

    They hold the request, and all that were computed beside it; the request's feed holds the error.
    """
    errors, seen = [error], set[FrameType]()
    for found in errors:
        errors += [other for other in (found.__cause__, found.__context__) if other is not None and other not in errors]
        traceback = found.__traceback__
        while traceback is not None:
            _clear(traceback.tb_frame, seen)
            traceback = traceback.tb_next


def _clear(frame: FrameType | None, seen: set[FrameType]) -> None:
    while frame is not None and frame not in seen:  # else those behind it have been seen, too
        seen.add(frame)
        with contextlib.suppress(RuntimeError):  # it still runs
            frame.clear()
        frame = frame.f_back  # which it keeps, though a traceback doesn't show it
