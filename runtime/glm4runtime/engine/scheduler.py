"""Who runs next: what many sequences that share a few slots are given, decided step by step.

Decisions only: no arrays, no threads, no clock of its own (``now`` and durations are arguments), so that a simulator
can drive it through thousands of traces. A step is a :class:`Plan`; what came of it is told by
:meth:`Scheduler.reused`, :meth:`~Scheduler.prefilled`, :meth:`~Scheduler.decoded` and :meth:`~Scheduler.finish`.

- Keys (clients) take turns, and within a key those who came first go first. A free slot is all that admission needs.
- A step has one decode run, over all that decode, and in front of it at most one chunk of one prompt. While anyone
  decodes, the chunk is as wide as the measured speed lets it be within ``stall_seconds``; else it is as wide as can be.
- Of several prompts the one with the least left goes first, but one that was passed over ``slots`` times goes before
  it. So between two chunks of a prompt there are at most ``2 * slots - 1`` of others.
- Sequences of one request (several answers, beams) share its prompt: it is computed once, and its rows are copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm4runtime.contract import UserError
from glm4runtime.engine.plan import Plan, QueueFull, SchedulerStats

LEAST_WIDTH = 16  # tokens; narrower chunks cost more in weights read than they save in waiting
_DECAY = 0.8  # of a measurement's weight, at each one that follows


@dataclass
class _Sequence:
    id: int
    key: str
    prompt_tokens: int
    max_new_tokens: int
    deadline: float
    group: int  # those of one group share a prompt
    together: bool  # gets its slot in the same step as the others of the group
    slot: int | None = None
    rows: int = 0  # prompt tokens in the cache
    answered: int = 0  # tokens of the answer, about
    passed: int = 0  # chunks of others since its last one

    @property
    def left(self) -> int:
        return self.prompt_tokens - self.rows


class _Ratio:
    """Of two measured amounts, the latest counting most: units a second, tokens an answer."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def note(self, above: float, below: float) -> None:
        if below > 0:
            self._above, self._below = _DECAY * self._above + above, _DECAY * self._below + below

    @property
    def value(self) -> float | None:
        return self._above / self._below if self._above else None


class Scheduler:
    """Decides for up to ``slots`` sequences at once, and a queue of others. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        slots: int,
        *,
        max_queue: int = 64,
        prefill_chunk: int = 512,
        prompt_grid: int = 1,
        stall_seconds: float = 0.2,
    ) -> None:
        """max_queue: requests that may wait for a slot. prefill_chunk: the widest chunk, in tokens. prompt_grid:
        chunks have a multiple of so many, but for a prompt's last one (``BatchRunner.prompt_grid``). stall_seconds:
        how long a chunk may hold up those that decode; the narrowest chunk may take longer.

        Raises UserError for a number that makes no sense.
        """
        for name, value, least in (
            ("slots", slots, 1),
            ("max_queue", max_queue, 0),
            ("prompt_grid", prompt_grid, 1),
            ("prefill_chunk", prefill_chunk, prompt_grid),
        ):
            if value < least:
                raise UserError(f"{name}={value}: expected at least {least}")
        if not 0 < stall_seconds < math.inf:
            raise UserError(f"stall_seconds={stall_seconds}: expected a finite number of seconds above 0")
        self.slots, self.max_queue, self.stall_seconds = slots, max_queue, stall_seconds
        self._grid = prompt_grid
        self._most = prefill_chunk - prefill_chunk % prompt_grid
        self._least = min(self._most, math.ceil(LEAST_WIDTH / prompt_grid) * prompt_grid)
        self._sequences: dict[int, _Sequence] = {}  # all of them
        self._queues: dict[str, list[_Sequence]] = {}  # those without a slot; the key whose turn it is comes first
        self._running: dict[int, _Sequence] = {}  # those with one, in the order in which they got it
        self._free = list(range(slots - 1, -1, -1))
        self._decoding: list[int] = []  # of the last plan
        self._prefill_speed, self._decode_speed, self._answers = _Ratio(), _Ratio(), _Ratio()

    def submit(
        self,
        id: int,
        key: str,
        prompt_tokens: int,
        max_new_tokens: int,
        *,
        deadline: float | None = None,
        parent: int | None = None,
        together: bool = False,
    ) -> None:
        """Let a sequence wait for a slot.

        deadline: the time at which it expires, waiting or running. parent: a sequence of the same request, whose
        prompt this one shares; it counts as no request of its own, so it is never refused where its parent wasn't.
        It waits until that prompt is done, and others may pass it meanwhile. together: it needs its slot at the same
        time as its parent (beams): nobody else is admitted until there are slots for all of them.

        The logits behind a shared prompt are the caller's to keep for those that still wait. One whose relatives have
        all ended before it gets a slot has its prompt computed again.

        Raises:
            QueueFull: ``max_queue`` requests wait already, beyond those that a slot is free for.
            UserError: more sequences belong ``together`` than there are slots.
            ValueError: an id that is in use, a prompt without tokens, or a parent that isn't here or has another prompt
                or key.
        """
        if id in self._sequences or prompt_tokens < 1:
            raise ValueError(f"submit: id {id} is in use, or {prompt_tokens} is no number of prompt tokens")
        group = id
        if parent is None:
            waiting = sum(item.id == item.group for queue in self._queues.values() for item in queue)
            if waiting >= self.max_queue + len(self._free):
                raise QueueFull(self.max_queue, max(1, math.ceil(self._until(1))))
        else:
            found = self._sequences.get(parent)
            if found is None or (found.key, found.prompt_tokens) != (key, prompt_tokens):
                raise ValueError(f"submit: {parent} is no sequence with {id}'s key and prompt")
            group = found.group
            size = 2 + sum(item.together for item in self._queues.get(key, ()) if item.group == group)
            if together and size > self.slots:
                raise UserError(
                    f"{size} sequences have to run together, and there are {self.slots} slots; ask for fewer"
                )
        sequence = _Sequence(
            id, key, prompt_tokens, max_new_tokens, math.inf if deadline is None else deadline, group, together
        )
        self._sequences[id] = sequence
        self._queues.setdefault(key, []).append(sequence)

    def plan(self, now: float) -> Plan:
        """What to do next. ``now`` is on the clock of the deadlines."""
        expired = [item.id for item in self._sequences.values() if item.deadline <= now]
        for id in expired:
            self._remove(id)
        admit = self._admit()
        self._decoding = [item.id for item in self._running.values() if not item.left]
        copies = self._copy()
        return Plan(expired, admit, copies, self._chunk(), list(self._decoding))

    def reused(self, id: int, tokens: int) -> None:
        """The first tokens of a prompt were found in the prefix store; at least one is left to compute."""
        sequence = self._sequences[id]
        if sequence.slot is None or sequence.rows or not 0 <= tokens < sequence.prompt_tokens:
            raise ValueError(f"reused: {id} has {sequence.rows} of {sequence.prompt_tokens} tokens, and {tokens} more")
        sequence.rows = tokens

    def prefilled(self, id: int, tokens: int, seconds: float) -> None:
        """So many more tokens of a prompt were computed, in so many seconds; with the last one it decodes."""
        sequence = self._sequences[id]
        if sequence.slot is None or not 1 <= tokens <= sequence.left:
            raise ValueError(
                f"prefilled: {id} has {sequence.rows} of {sequence.prompt_tokens} tokens, and {tokens} more"
            )
        sequence.rows += tokens
        self._prefill_speed.note(tokens, seconds)

    def decoded(self, seconds: float) -> None:
        """The last plan's decode run took so long."""
        self._decode_speed.note(1, seconds)
        for id in self._decoding:
            if id in self._running:
                self._running[id].answered += 1

    def finish(self, id: int) -> None:
        """A sequence has ended, with an answer or an error: what it held is free. Raises KeyError for an unknown id."""
        sequence = self._sequences[id]
        if sequence.answered:
            self._answers.note(sequence.answered, 1)
        self._remove(id)

    def cancel(self, id: int) -> bool:
        """Drop a sequence, whatever it is doing: what it held is free. False where it isn't here any more."""
        if id not in self._sequences:
            return False
        self._remove(id)
        return True

    def eta(self) -> float:
        """Seconds that a request submitted now would wait for a slot, estimated from measured speeds and lengths.

        0 where it wouldn't wait, or nothing was measured so far.
        """
        return self._until(len(self._sequences) - self.slots + 1)

    def stats(self) -> SchedulerStats:
        """The numbers of this moment, for metrics."""
        return SchedulerStats(
            waiting=len(self._sequences) - len(self._running),
            running=len(self._running),
            prefilling=sum(item.left > 0 for item in self._running.values()),
            queued={key: len(queue) for key, queue in self._queues.items()},
            prefill_tokens_per_second=self._prefill_speed.value,
            decode_runs_per_second=self._decode_speed.value,
        )

    def _remove(self, id: int) -> None:
        sequence = self._sequences.pop(id)
        if sequence.slot is None:
            self._unqueue(sequence)
        else:
            self._running.pop(id)
            self._free.append(sequence.slot)

    def _unqueue(self, sequence: _Sequence) -> None:
        queue = self._queues[sequence.key]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.key]

    def _admit(self) -> list[tuple[int, int]]:
        admitted: list[tuple[int, int]] = []
        while self._free and (first := self._next()):
            queue = self._queues[first.key]
            party = [
                first,
                *(item for item in queue if item.together and item.group == first.group and item is not first),
            ]
            if len(party) > len(self._free):  # nobody passes them, or they might wait forever
                break
            for item in party:
                item.slot = self._free.pop()
                self._running[item.id] = item
                self._unqueue(item)
                admitted.append((item.id, item.slot))
            if queue:
                self._queues[first.key] = self._queues.pop(first.key)  # behind the other keys
        return admitted

    def _next(self) -> _Sequence | None:
        """The first, of the first key that has one, whose prompt isn't just being computed for a relative."""
        busy = {item.group for item in self._running.values() if item.left}
        return next((item for queue in self._queues.values() for item in queue if item.group not in busy), None)

    def _copy(self) -> list[tuple[int, int]]:
        """Sequences that get the rows of a relative whose prompt is done; from the next plan on they decode."""
        copies = []
        sources = {self._running[id].group: id for id in reversed(self._decoding)}
        for item in self._running.values():
            if item.left and item.group in sources:
                copies.append((sources[item.group], item.id))
                item.rows = item.prompt_tokens
        return copies

    def _chunk(self) -> tuple[int, int] | None:
        undone = [item for item in self._running.values() if item.left]
        if not undone:
            return None
        # Of each group only the one that came first is ever chosen: of equals the first is, and it has the least left.
        chosen = max(undone, key=lambda item: item.passed)
        if chosen.passed < self.slots:
            chosen = min(undone, key=lambda item: item.left)
        for item in undone:
            item.passed = 0 if item.group == chosen.group else item.passed + 1
        return chosen.id, self._width() if self._decoding else self._most

    def _width(self) -> int:
        """The widest chunk that is done within the stall that is allowed; the narrowest where speed isn't known."""
        fits = int((self._prefill_speed.value or 0) * self.stall_seconds)
        return min(max(fits - fits % self._grid, self._least), self._most)

    def _until(self, ends: int) -> float:
        """Seconds until so many of the sequences have ended: as large a part of all the work that is left."""
        if ends <= 0:
            return 0.0
        answer = self._answers.value or math.inf
        prompts: dict[int, int] = {}  # tokens left by group: each prompt is computed once
        for item in self._sequences.values():
            prompts[item.group] = min(item.left, prompts.get(item.group, item.left))
        tokens = sum(max(1.0, min(item.max_new_tokens, answer) - item.answered) for item in self._sequences.values())
        speed, runs = self._prefill_speed.value, self._decode_speed.value
        seconds = sum(prompts.values()) / speed if speed else 0.0
        seconds += tokens / min(self.slots, len(self._sequences)) / runs if runs else 0.0
        return seconds * ends / len(self._sequences)
