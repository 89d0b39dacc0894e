"""The scheduler, driven by a simulator with a clock and speeds of its own that checks every plan against its rules."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4runtime import UserError
from glm4runtime.engine.plan import Plan, QueueFull
from glm4runtime.engine.scheduler import LEAST_WIDTH, Scheduler

KEYS = "abc"
PROMPTS = (1, 15, 16, 17, 40, 64, 100, 170)
GROUPS = (1, 1, 1, 2, 3)  # sequences of a request
PATIENCE = (None, None, 0.2, 2.0)  # seconds
TRACES, OPERATIONS = 20, 7  # traces in an example, things that happen in a trace


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
        plan = self.scheduler.plan(self.now)
        self._expire(plan)
        decoding = [item.id for item in self.running() if item.done]
        self._admit(plan)
        self._copy(plan)
        self._prefill(plan, bool(decoding))
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

    def _expire(self, plan: Plan) -> None:
        late = [id for id, item in self.all.items() if item.deadline is not None and item.deadline <= self.now]
        assert plan.expired == late
        for id in late:
            del self.all[id]

    def _admit(self, plan: Plan) -> None:
        held = {item.slot for item in self.running()}
        busy = {item.group for item in self.running() if not item.done}
        admitted = set()
        for id, slot in plan.admit:
            item = self.all[id]
            assert item.slot is None and slot not in held and 0 <= slot < self.slots
            held.add(slot)
            item.slot = slot
            if item.together and item.group in admitted:
                continue
            assert item.group not in busy, "its prompt is just being computed"
            for other in self.waiting():
                if other.group not in busy and other.group != item.group:
                    other.turns -= 1
                    assert other.turns >= 0, "keys take turns"
            admitted.add(item.group)
            if not any(other.done for other in self.running() if other.group == item.group):
                busy.add(item.group)
        assert len(held) <= self.slots
        free = self.slots - len(held)
        first = {item.key: item for item in reversed(self.able())}
        if free and first:  # only sequences that belong together leave a slot free
            assert any(1 + self.beside(item) > free for item in first.values())
        for id, _ in plan.admit:
            item = self.all[id]
            if (
                not any(other.group == item.group and other is not item for other in self.running())
                and not item.together
            ):
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

    def _prefill(self, plan: Plan, anyone_decodes: bool) -> None:
        undone = [item for item in self.running() if not item.done]
        assert (plan.prefill is not None) == bool(undone)
        if plan.prefill is None:
            return
        id, width = plan.prefill
        item = self.all[id]
        assert item in undone and width % self.grid == 0
        if anyone_decodes:
            least = min(max(self.grid, LEAST_WIDTH + -LEAST_WIDTH % self.grid), self.most)
            fits = self.speed * self.scheduler.stall_seconds if self.measured else 0.0
            assert least <= width <= max(least, fits + 1e-6)
            assert width == self.most or width + self.grid > fits - 1e-6, "no narrower than it has to be"
        else:
            assert width == self.most
        tokens = min(width, item.prompt - item.rows)
        for other in undone:
            other.passed = 0 if other.group == item.group else other.passed + 1
            assert other.passed < 2 * self.slots, "no prompt stands still"
        item.rows += tokens
        self.now += tokens / self.speed
        self.scheduler.prefilled(id, tokens, tokens / self.speed)
        self.measured = True

    def count(self) -> None:
        """Whether the scheduler's numbers are right."""
        stats = self.scheduler.stats()
        running, waiting = self.running(), self.waiting()
        assert (stats.running, stats.waiting) == (len(running), len(waiting))
        assert stats.prefilling == sum(not item.done for item in running)
        assert stats.queued == {key: n for key in KEYS if (n := sum(item.key == key for item in waiting))}

    def bound(self) -> int:
        """Steps in which all that are here must have ended, whatever else happens."""
        chunks = sum(-(-item.prompt // LEAST_WIDTH) for item in self.all.values())
        return chunks + sum(item.answer + 1 for item in self.all.values()) + 1


def run(source: Random) -> None:
    """One trace: things that happen in any order, and then nothing more until everybody is served."""
    machine = Machine(
        source.randint(1, 4),
        source.randint(0, 7),
        source.choice((1, 2, 64)),
        source.choice((50.0, 100.0, 250.0, 4000.0)),
    )
    for _ in range(OPERATIONS):
        match source.randrange(6):
            case 0 | 1 | 2:
                prompt, size, patience = source.choice(PROMPTS), source.choice(GROUPS), source.choice(PATIENCE)
                machine.submit(source.choice(KEYS), prompt, source.randint(1, 4), size, source.random() < 0.5, patience)
            case 3:
                machine.end(source.randrange(99), cancel=source.random() < 0.7)
                machine.step()
            case 4:
                machine.now += source.random()
            case 5:
                for _ in range(source.randint(1, 3)):
                    machine.step()
        machine.count()
    for _ in range(machine.bound()):
        if machine.all:
            machine.step()
    assert not machine.all, "everybody is served"
    machine.count()
    last = machine.scheduler
    for id in range(-machine.slots, 0):
        last.submit(id, "a", 1, 1)
    assert sorted(slot for _, slot in last.plan(machine.now).admit) == list(range(machine.slots)), "every slot is free"


@given(st.integers(0, 2**63))
@settings(max_examples=10_000 // TRACES, deadline=None)
def test_ten_thousand_traces(seed: int) -> None:
    source = Random(seed)
    for _ in range(TRACES):
        run(source)


def drive(scheduler: Scheduler, plan: Plan, *, speed: float = 100.0, left: int = 1000) -> None:
    """Carry out a plan's prefill, of a prompt with ``left`` tokens, and its decode run of 0.1 s."""
    if plan.prefill:
        id, width = plan.prefill
        scheduler.prefilled(id, min(width, left), min(width, left) / speed)
    if plan.decode:
        scheduler.decoded(0.1)


def test_a_full_queue_says_when_to_come_back() -> None:
    scheduler = Scheduler(1, max_queue=1)
    for id in (0, 1):
        scheduler.submit(id, "a", 100, 30)
    with pytest.raises(QueueFull, match=r"the queue is full: 1 requests \(max_queue\) .* again in about 1 s") as error:
        scheduler.submit(2, "b", 100, 30)
    assert isinstance(error.value, UserError) and error.value.retry_after == 1  # nothing was measured yet
    drive(scheduler, scheduler.plan(0.0), left=100)
    drive(scheduler, scheduler.plan(1.0))
    # Left: 29 and 30 tokens of answers at 10 a second, and a prompt of one second. One of the two has to end.
    assert scheduler.eta() == pytest.approx((29 + 30) / 10 + 1)
    with pytest.raises(QueueFull) as error:
        scheduler.submit(2, "b", 100, 30)
    assert error.value.retry_after == 4  # half of 6.9 s, rounded up


def test_the_estimate_follows_the_length_of_answers() -> None:
    scheduler = Scheduler(1)
    assert scheduler.eta() == 0
    scheduler.submit(0, "a", 10, 1000)
    for _ in range(5):
        drive(scheduler, scheduler.plan(0.0), left=10)
    scheduler.finish(0)  # after 4 tokens of 1000
    assert scheduler.eta() == 0, "a slot is free"
    scheduler.submit(1, "a", 100, 1000)
    scheduler.submit(2, "a", 100, 1000)
    assert scheduler.eta() == pytest.approx(2 * (1 + 0.4))


def test_a_wide_chunk_alone_and_a_narrow_one_beside_others() -> None:
    scheduler = Scheduler(2, prefill_chunk=513, prompt_grid=2, stall_seconds=0.5)
    scheduler.submit(0, "a", 10, 10)
    scheduler.submit(1, "a", 2000, 10)
    assert scheduler.plan(0.0).prefill == (0, 512)
    scheduler.prefilled(0, 10, 0.0)  # no time at all measures nothing
    plan = scheduler.plan(0.0)
    assert (plan.prefill, plan.decode) == ((1, LEAST_WIDTH), [0])
    scheduler.prefilled(1, 16, 16 / 205)
    assert scheduler.plan(0.0).prefill == (1, 102)  # of 102.5
    scheduler.finish(0)
    assert scheduler.plan(0.0) == Plan(prefill=(1, 512))


def test_answers_share_a_prompt() -> None:
    scheduler = Scheduler(3)
    scheduler.submit(0, "a", 1000, 10)
    scheduler.submit(1, "a", 1000, 10, parent=0)
    scheduler.submit(2, "a", 1000, 10, parent=1)
    scheduler.submit(3, "a", 50, 10)
    assert scheduler.plan(0.0).admit == [(0, 0), (3, 1)], "others pass those that wait for a prompt"
    scheduler.prefilled(3, 50, 1.0)
    scheduler.prefilled(0, 1000, 1.0)
    plan = scheduler.plan(0.0)
    assert (plan.admit, plan.copies, plan.decode) == ([(1, 2)], [(0, 1)], [0, 3])
    scheduler.finish(0)
    plan = scheduler.plan(0.0)
    assert (plan.admit, plan.copies, plan.decode) == ([(2, 0)], [(1, 2)], [3, 1]), "any relative will do"
    assert scheduler.plan(0.0).decode == [3, 1, 2]


def test_a_prompt_whose_relatives_are_gone_is_computed_again() -> None:
    scheduler = Scheduler(1)
    scheduler.submit(0, "a", 20, 10)
    scheduler.submit(1, "a", 20, 10, parent=0)
    scheduler.plan(0.0)
    scheduler.prefilled(0, 20, 1.0)
    scheduler.finish(0)
    assert scheduler.plan(0.0) == Plan(admit=[(1, 0)], prefill=(1, 512))


def test_beams_begin_together() -> None:
    scheduler = Scheduler(3)
    scheduler.submit(0, "a", 20, 10)
    scheduler.submit(1, "a", 20, 10)
    scheduler.submit(2, "a", 20, 10, parent=1, together=True)
    scheduler.submit(3, "a", 20, 10, parent=1, together=True)
    scheduler.submit(4, "b", 20, 10)
    with pytest.raises(UserError, match="4 sequences have to run together, and there are 3 slots"):
        scheduler.submit(5, "a", 20, 10, parent=1, together=True)
    assert scheduler.plan(0.0).admit == [(0, 0), (4, 1)]
    scheduler.finish(0)
    assert scheduler.plan(0.0).admit == [], "two slots are free, three are needed"
    scheduler.finish(4)
    assert [id for id, _ in scheduler.plan(0.0).admit] == [1, 2, 3]
    scheduler.prefilled(1, 20, 1.0)
    assert scheduler.plan(0.0).copies == [(1, 2), (1, 3)]
    assert scheduler.plan(0.0).decode == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"slots": 0}, "slots=0: expected at least 1"),
        ({"slots": 1, "max_queue": -1}, "max_queue=-1: expected at least 0"),
        ({"slots": 1, "prompt_grid": 64, "prefill_chunk": 63}, "prefill_chunk=63: expected at least 64"),
        ({"slots": 1, "stall_seconds": float("nan")}, "stall_seconds=nan: expected a finite number"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Scheduler(**options)


def test_misuse_is_told() -> None:
    scheduler = Scheduler(1)
    scheduler.submit(0, "a", 10, 10)
    for arguments, options in (((0, "a", 10, 10), {}), ((1, "a", 0, 10), {}), ((1, "b", 10, 10), {"parent": 0})):
        with pytest.raises(ValueError, match="submit"):
            scheduler.submit(*arguments, **options)
    with pytest.raises(ValueError, match="prefilled"):
        scheduler.prefilled(0, 5, 1.0)  # it has no slot yet
    scheduler.plan(0.0)
    with pytest.raises(ValueError, match="reused"):
        scheduler.reused(0, 10)  # the last token's logits are wanted
    with pytest.raises(KeyError):
        scheduler.finish(7)
