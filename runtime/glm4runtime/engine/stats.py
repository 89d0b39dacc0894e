"""An engine's numbers, for metrics and health checks."""

from __future__ import annotations

from dataclasses import dataclass

from glm4runtime.engine.plan import SchedulerStats
from glm4runtime.engine.prefix import PrefixStats


@dataclass(frozen=True)
class EngineStats:
    """Numbers of this moment, and totals since the engine was opened."""

    healthy: bool  # its thread lives, and runs don't fail
    death: str | None  # what its thread died of; it answers nothing any more
    last_step_age: float  # seconds since the thread last came round; it does at least once a second
    slots: int
    scheduler: SchedulerStats
    prompt_tokens: int  # this and the next four: of requests that got a slot, once they have ended, failed ones too
    cached_tokens: int  # of these: found in the prefix cache
    completion_tokens: int
    drafted_tokens: int  # guesses of prompt lookup and the draft bundle
    accepted_tokens: int  # of these: right
    finished: dict[str, int]  # answers by finish_reason, and ``error``
    prefixes: PrefixStats | None  # None where none are kept
