"""Objects that outlive their use, because they hold each other, or something holds them for good."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Collection


def left_behind(act: Callable[[], object], among: Collection[str] = ()) -> set[str]:
    """Types of ours of which there are more once ``act`` is over, without the garbage collector's help.

    Threads may still be at it a little longer: they're waited for. among: the types that matter, if not all do.
    """
    act()  # what is made once and kept
    gc.collect()
    gc.disable()
    try:
        before = _ours(among)
        act()
        end = time.monotonic() + 5
        while (left := _ours(among) - before) and time.monotonic() < end:
            pass
        return set(left)
    finally:
        gc.enable()


def _ours(among: Collection[str]) -> Counter[str]:
    types = (type(found) for found in gc.get_objects())
    names = Counter(kind.__qualname__ for kind in types if str(kind.__module__).startswith("glm4"))
    return Counter({name: names[name] for name in among or names})
