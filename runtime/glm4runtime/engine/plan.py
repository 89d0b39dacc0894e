"""What a scheduler says: a step, its numbers, and that no more can wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from glm4runtime.contract import UserError


class QueueFull(UserError):
    """As many requests wait as may. ``retry_after``: seconds, at least 1, until a place should be free."""

    def __init__(self, max_queue: int, retry_after: int) -> None:
        super().__init__(
            f"the queue is full: {max_queue} requests (max_queue) wait for a slot; "
            f"try again in about {retry_after} s, or give the engine a longer queue or more slots"
        )
        self.retry_after = retry_after


@dataclass(frozen=True)
class Plan:
    """One step, to be carried out in the order of these fields."""

    expired: list[int] = field(default_factory=list)  # past their deadline: they have no slot any more
    admit: list[tuple[int, int]] = field(default_factory=list)  # id and the slot that it gets
    copies: list[tuple[int, int]] = field(default_factory=list)  # prompt rows of the first id's slot to the second's
    prefill: tuple[int, int] | None = None  # id, and the most tokens of its prompt to run now
    decode: list[int] = field(default_factory=list)  # one token each, in one run

    @property
    def idle(self) -> bool:
        """Whether nothing is to be run: nobody waits either."""
        return self.prefill is None and not self.decode and not self.copies


@dataclass(frozen=True)
class SchedulerStats:
    """Sequences by what they do, and the speeds that decisions are based on (None: not measured so far)."""

    waiting: int  # without a slot
    running: int  # with one
    prefilling: int  # of those with one, whose prompt isn't done
    queued: dict[str, int]  # waiting, by key; keys where nobody waits are left out
    prefill_tokens_per_second: float | None
    decode_runs_per_second: float | None
