"""Objects that outlive their use, because they hold each other, or something holds them for good."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Collection


def left_behind(act: Callable[[], object], among: Collection[type] = ()) -> set[type]:
    """Types of ours of which there are more once ``act`` is over, without the garbage collector's help.

    Threads may still be at it a little longer: they're waited for. among: the types that matter, if not all do.
    """
    act()  # what is made once and kept
    gc.collect()
    gc.disable()
    try:
        before = _settled(among)
        act()
        end = time.monotonic() + 5
        while (left := _ours(among) - before) and time.monotonic() < end:
            time.sleep(0.01)
        return set(left)
    finally:
        gc.enable()


def _settled(among: Collection[type]) -> Counter[type]:
    """As many as two looks agree on: what a thread is about to let go of would hide what is left later."""
    end, before, found = time.monotonic() + 5, None, _ours(among)
    while found != before and time.monotonic() < end:
        time.sleep(0.01)
        before, found = found, _ours(among)
    return found


def _ours(among: Collection[type]) -> Counter[type]:
    types = (type(found) for found in gc.get_objects())
    return Counter(kind for kind in types if (kind in among if among else str(kind.__module__).startswith("glm4")))
