"""Long calls into a library, each in a thread of its own, so that a signal needn't wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make the calls, all at the same time, and return what they do in order. Raises the first one's error.

    Python handles signals in the main thread, between two of its instructions: behind a call there, Ctrl-C would wait.
    Interrupted, this returns at once, and what the calls still make is dropped; a Python that ends then waits for them.
    """
    done: list[T | None] = [None] * len(calls)
    failed: dict[int, BaseException] = {}

    def make(index: int) -> None:
        try:
            done[index] = calls[index]()
        except BaseException as error:  # raised again, in the calling thread
            failed[index] = error

    threads = [threading.Thread(target=make, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[min(failed)]
    return done  # type: ignore[return-value]
