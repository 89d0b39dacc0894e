"""What an engine does beside opening bundles: arguments of ``Engine.load``, checked before anything is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from glm4runtime.backends.settings import require_number
from glm4runtime.contract import UserError, shown

PrefixCache = Literal["prompt", "all", "off"]


@dataclass(frozen=True)
class EngineSettings:
    """:meth:`Engine.load` says what they mean. Raises UserError for those that make no sense."""

    prefix_cache: PrefixCache = "prompt"
    prefix_cache_bytes: int = 1 << 30
    max_queue: int = 64
    stall_ms: float = 200.0

    def __post_init__(self) -> None:
        if self.prefix_cache not in get_args(PrefixCache):
            known = ", ".join(get_args(PrefixCache))
            raise UserError(f"prefix_cache={shown(self.prefix_cache)}: expected {known}")
        require_number("prefix_cache_bytes", self.prefix_cache_bytes, 0)
        require_number("max_queue", self.max_queue, 0)
        stall = self.stall_ms
        if isinstance(stall, bool) or not isinstance(stall, int | float) or not 0 < stall < math.inf:
            raise UserError(f"stall_ms={shown(stall)}: expected a finite number of milliseconds above 0")
