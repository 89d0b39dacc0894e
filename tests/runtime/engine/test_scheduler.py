"""The scheduler, driven by a simulator with a clock and speeds of its own that checks every plan against its rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4runtime import UserError
from glm4runtime.engine.scheduler import LEAST_WIDTH, Plan, QueueFull, Scheduler

KEYS = "abc"
PROMPTS = (1, 15, 16, 17, 40, 64, 100, 300)
GROUPS = (1, 1, 1, 2, 3)  # sequences of a request
TRACES, OPERATIONS, TOGETHER = 4, 14, 3  # traces in an example, operations in a trace, examples cut into that


@dataclass
class Sequence:
    """What the simulator knows of one that hasn't ended."""

    id: int
    key: str
    prompt: int
    answer: int  # tokens
    deadline: float | None
    group: int
    together: bool
    turns: int  # of admissions that others may have before it is admitted
    slot: int | None = None
    rows: int = 0
    answered: int = 0
    passed: int = 0  # chunks of others since its last one

    @property
    def done(self) -> bool:
        return self.rows == self.prompt


class Machine:
    """Carries plans out as an engine does, and asserts what must hold of each."""

    def __init__(self, slots: int, max_queue: int, grid: int, speed: float) -> None:
        self.slots, self.max_queue, self.grid, self.speed = slots, max_queue, grid, speed
        self.most = max(64 - 64 % grid, grid)
        self.scheduler = Scheduler(
            slots, max_queue=max_queue, prefill_chunk=max(64, grid), prompt_grid=grid, stall_seconds=0.2
        )
        self.all: dict[int, Sequence] = {}
        self.now = 0.0
        self.ids = itertools.count()
        self.measured = False

    def running(self) -> list[Sequence]:
        return [item for item in self.all.values() if item.slot is not None]

    def waiting(self) -> list[Sequence]:
        return [item for item in self.all.values() if item.slot is None]

    def submit(self, key: str, prompt: int, answer: int, size: int, together: bool, patience: float | None) -> None:
        together = together and size <= self.slots
        deadline = None if patience is None else self.now + patience
        lead = next(self.ids)
        requests = sum(item.id == item.group for item in self.waiting())
        free = self.slots - len(self.running())
        for id in (lead, *itertools.islice(self.ids, size - 1)):
            ahead = sum(item.key == key for item in self.waiting())
            sequence = Sequence(
                id, key, prompt, answer, deadline, lead, together and id != lead, ahead + (ahead + 1) * (len(KEYS) - 1)
            )
            parent = None if id == lead else lead
            arguments = (id, key, prompt, answer + 3)
            if id == lead and requests >= self.max_queue + free:
                with pytest.raises(QueueFull) as error:
                    self.scheduler.submit(*arguments, deadline=deadline)
                assert error.value.retry_after >= 1
                return
            self.scheduler.submit(*arguments, deadline=deadline, parent=parent, together=sequence.together)
            self.all[id] = sequence

    def end(self, position: int, *, cancel: bool) -> None:
        """Cancel any, or end any with an error."""
        if not self.all:
            assert not self.scheduler.cancel(position)
            return
        id = list(self.all)[position % len(self.all)]
        del self.all[id]
        if cancel:
            assert self.scheduler.cancel(id)
            assert not self.scheduler.cancel(id)
        else:
            self.scheduler.finish(id)

    def step(self) -> None:
        known = self.scheduler.stats().prefill_tokens_per_second
        plan = self.scheduler.plan(self.now)
        self._expire(plan)
        decoding = [item.id for item in self.running() if item.done]
        self._admit(plan)
        self._copy(plan)
        self._prefill(plan, known, bool(decoding or plan.copies))
        assert sorted(plan.decode) == sorted(decoding)
        assert plan.idle == (not self.all), "whoever is here gets on"
        if plan.decode:
            self.now += 0.03
            self.scheduler.decoded(0.03)
        for id in plan.decode:
            item = self.all[id]
            item.answered += 1
            if item.answered == item.answer:
                self.scheduler.finish(id)
                del self.all[id]
        self._count()

    def _expire(self, plan: Plan) -> None:
        late = [id for id, item in self.all.items() if item.deadline is not None and item.deadline <= self.now]
        assert plan.expired == late
        for id in late:
            del self.all[id]

    def _admit(self, plan: Plan) -> None:
        held = {item.slot for item in self.running()}
        groups = set()
        for id, slot in plan.admit:
            item = self.all[id]
            assert item.slot is None and slot not in held and 0 <= slot < self.slots
            busy = {other.group for other in self.running() if not other.done and other.group not in groups}
            assert item.group not in busy, "its prompt is just being computed"
            held.add(slot)
            if item.group not in groups or not item.together:
                turn = {other.id for other in self.waiting() if other.group not in busy}
                for other in turn - {id}:
                    self.all[other].turns -= 1
                    assert self.all[other].turns >= 0 or self.all[other].group == item.group, "keys take turns"
            groups.add(item.group)
            item.slot = slot
        assert len(held) <= self.slots
        free = self.slots - len(held)
        first = {item.key: item for item in reversed(self.able())}
        if free and first:  # only sequences that belong together leave a slot free
            assert any(1 + self.beside(item) > free for item in first.values())
        for id, _ in plan.admit:
            item = self.all[id]
            if not any(other.group == item.group and other is not item for other in self.running()) and not item.together:
                hit = item.prompt // 2 - item.prompt // 2 % self.grid if item.prompt % 5 == 0 else 0
                self.scheduler.reused(id, hit)
                item.rows = hit

    def able(self) -> list[Sequence]:
        busy = {item.group for item in self.running() if not item.done}
        return [item for item in self.waiting() if item.group not in busy]

    def beside(self, first: Sequence) -> int:
        return sum(item.together and item.group == first.group and item is not first for item in self.waiting())

    def _copy(self, plan: Plan) -> None:
        done = {item.group for item in self.running() if item.done}
        assert {target for _, target in plan.copies} == {
            item.id for item in self.running() if not item.done and item.group in done
        }
        for source, target in plan.copies:
            assert self.all[source].done and self.all[source].group == self.all[target].group
        for _, target in plan.copies:
            self.all[target].rows = self.all[target].prompt

    def _prefill(self, plan: Plan, known: float | None, anyone_decodes: bool) -> None:
        undone = [item for item in self.running() if not item.done]
        assert (plan.prefill is not None) == bool(undone)
        if plan.prefill is None:
            return
        id, width = plan.prefill
        item = self.all[id]
        assert item in undone and width % self.grid == 0
        if anyone_decodes:
            least = min(max(self.grid, LEAST_WIDTH + -LEAST_WIDTH % self.grid), self.most)
            assert least <= width <= max(least, (known or 0) * self.scheduler.stall_seconds + 1e-6)
            assert known is None or known == pytest.approx(self.speed)
        else:
            assert width == self.most
        tokens = min(width, item.prompt - item.rows)
        for other in undone:
            other.passed = 0 if other.group == item.group else other.passed + 1
            assert other.passed < 2 * self.slots, "no prompt stands still"
        item.rows += tokens
        self.now += tokens / self.speed
        self.scheduler.prefilled(id, tokens, tokens / self.speed)

    def _count(self) -> None:
        stats = self.scheduler.stats()
        running, waiting = self.running(), self.waiting()
        assert (stats.running, stats.waiting) == (len(running), len(waiting))
        assert stats.prefilling == sum(not item.done for item in running)
        assert stats.queued == {key: n for key in KEYS if (n := sum(item.key == key for item in waiting))}

    def bound(self) -> int:
        """Steps in which all that are here must have ended, whatever else happens."""
        chunks = sum(-(-item.prompt // LEAST_WIDTH) for item in self.all.values())
        return chunks + sum(item.answer + 1 for item in self.all.values()) + 1


def operations(data: bytes) -> Iterator[tuple[int, int]]:
    return zip(data[::2], data[1::2], strict=False)


def run(data: bytes) -> None:
    head, data = data[:4].ljust(4, b"\0"), data[4:]
    machine = Machine(1 + head[0] % 4, head[1] % 8, (1, 2, 64)[head[2] % 3], (50.0, 100.0, 250.0, 4000.0)[head[3] % 4])
    for what, how in operations(data):
        match what % 8:
            case 0 | 1 | 2:
                machine.submit(
                    KEYS[how % 3],
                    PROMPTS[how // 3 % 8],
                    1 + how % 5,
                    GROUPS[what // 8 % 5],
                    what >= 128,
                    (None, None, 0.2, 2.0)[how // 64],
                )
            case 3 | 4 | 5:
                for _ in range(1 + how % 4):
                    machine.step()
            case 6:
                machine.end(how // 2, cancel=how % 2 == 0)
                machine.step()
            case 7:
                machine.now += how / 100
    for _ in range(machine.bound()):
        if not machine.all:
            break
        machine.step()
    assert not machine.all, "everybody is served"
    machine.step()
    assert sorted(machine.scheduler._free) == list(range(machine.slots))


SIZE = 4 + 2 * OPERATIONS


@given(st.binary(min_size=TRACES * SIZE, max_size=TRACES * SIZE))
@settings(max_examples=2500, deadline=None, database=None)
def test_ten_thousand_traces(data: bytes) -> None:
    for first in range(0, len(data), SIZE):
        run(data[first : first + SIZE])
