"""Objects that outlive their use, because they hold each other."""

from __future__ import annotations

import gc
from collections.abc import Callable


def left_to_the_collector(act: Callable[[], object]) -> set[str]:
    """Types of ours of which ``act`` leaves objects that nobody holds and that reference counts alone don't free."""
    act()  # what is made once and kept
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        act()
        gc.collect()
        return {type(found).__qualname__ for found in gc.garbage if type(found).__module__.startswith("glm4")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
