"""The thread that computes: the one owner of scheduler, slots and answers, which others reach through a lock."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from glm4runtime.contract import UserError
from glm4runtime.engine.failure import failure, told
from glm4runtime.engine.handle import RequestFailed
from glm4runtime.engine.job import Answer, Job
from glm4runtime.engine.loop import Loop
from glm4runtime.engine.request import FinishReason
from glm4runtime.engine.scheduler import Scheduler
from glm4runtime.engine.stats import EngineStats

T = TypeVar("T")
_FAILURES = 3  # runs that fail one after the other: from then on the engine isn't healthy


class EngineClosed(UserError):
    """The engine takes no more requests: it is draining, closed, or its thread has died."""


class Worker:
    """A thread that takes jobs, and runs :class:`Loop` as :class:`Scheduler` plans. Any thread may call the methods."""

    def __init__(self, scheduler: Scheduler, loop: Loop) -> None:
        """Start the thread. scheduler, loop: this object's own from now on."""
        self.scheduler, self.loop = scheduler, loop
        self.condition = threading.Condition()  # guards what follows; never held while a graph runs
        self.answers: dict[int, Answer] = {}  # by the scheduler's id
        self._ids = itertools.count()
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._draining = self.closing = False
        self._death: BaseException | None = None
        self._last_step = time.monotonic()
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self.thread = threading.Thread(target=self._run, name="glm4-engine", daemon=True)
        self.thread.start()

    def require_open(self) -> None:
        """Raise EngineClosed where no more jobs are taken."""
        with self.condition:
            self._require_open()

    def submit(self, job: Job, deadline: float | None) -> None:
        """Have all of a job's answers wait for slots, or none of them. deadline: as ``time.monotonic`` counts.

        Raises QueueFull where as many wait as may, EngineClosed where no more are taken.
        """
        key, tokens, limit = job.request.key, len(job.ids), job.request.params.max_new_tokens
        ids: list[int] = []
        with self.condition:
            try:
                self._require_open()
                for answer in job.answers:
                    id, parent = next(self._ids), ids[0] if ids else None
                    together = job.beams is not None and parent is not None
                    ids.append(id)
                    self.answers[id] = answer  # the scheduler knows none that isn't here, wherever an interrupt comes
                    self.scheduler.submit(id, key, tokens, limit, deadline=deadline, parent=parent, together=together)
            except BaseException:
                for id in ids:
                    self.scheduler.cancel(id)
                    self.answers.pop(id, None)
                job.release()
                raise
            self.condition.notify_all()

    def call(self, function: Callable[[], T]) -> T:
        """What :meth:`Engine.call` says."""
        if threading.current_thread() is self.thread:
            return function()
        future: Future[T] = Future()
        with self.condition:
            self._require_thread()
            self._calls.append((function, future))
            self.condition.notify_all()
        try:
            return future.result()
        finally:
            del future  # the error holds this frame, and the future the error

    def stats(self) -> EngineStats:
        """The numbers of this moment."""
        store = self.loop.store
        with self.condition:
            return EngineStats(
                healthy=self._death is None
                and not self.closing
                and self.thread.is_alive()
                and self.loop.failures_in_a_row < _FAILURES,
                death=None if self._death is None else told(self._death),
                last_step_age=time.monotonic() - self._last_step,
                slots=self.scheduler.slots,
                scheduler=self.scheduler.stats(),
                prompt_tokens=self._totals["prompt_tokens"],
                cached_tokens=self._totals["cached_tokens"],
                completion_tokens=self._totals["completion_tokens"],
                drafted_tokens=self._totals["drafted_tokens"],
                accepted_tokens=self._totals["accepted_tokens"],
                finished=dict(self._finished),
                prefixes=None if store is None else store.stats(),
            )

    def eta(self) -> float:
        """Seconds that a request submitted now would wait for a slot."""
        with self.condition:
            return self.scheduler.eta()

    def drain(self, timeout: float | None) -> bool:
        """Take no more jobs, and wait for those under way; False where some are left after ``timeout`` seconds."""
        with self.condition:
            self._draining = True
            return self.condition.wait_for(lambda: not self.answers or self._death is not None, timeout)

    def close(self) -> None:
        """End the thread, which frees graphs and cache. Jobs under way end as ``cancelled``."""
        with self.condition:
            self._draining = self.closing = True
            self.condition.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join()  # at once in a forked child

    def forked(self) -> None:
        """In a child: the thread isn't here, and may have held the lock."""
        self.condition = threading.Condition()
        self._death = UserError("the process forked, and threads stay in the parent")

    def _require_thread(self) -> None:
        if self._death is not None:
            raise EngineClosed(f"the engine's thread has died: {told(self._death)}; load the bundle again")
        if self.closing:
            raise EngineClosed("the engine is closed; load the bundle again")

    def _require_open(self) -> None:
        self._require_thread()
        if self._draining:
            raise EngineClosed("the engine takes no more requests: it is being drained, to be closed then")

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # a fault of ours: nobody may wait for it
            self._death = error
        finally:
            with self.condition:
                self._end_all()
                self.condition.notify_all()
            self.loop.close()

    def _end_all(self) -> None:
        """Tell everybody who waits that the engine has ended."""
        ids = list(self.answers)
        while self.answers:
            self._give_up(next(iter(self.answers.values())).job)
        for _, future in self._calls:
            future.set_exception(self._told_death() or EngineClosed("the engine was closed"))
        self._calls.clear()
        for id in ids:  # last: the fault may be the scheduler's own
            with contextlib.suppress(Exception):
                self.scheduler.cancel(id)

    def _give_up(self, job: Job) -> None:
        """Tell a job's reader that the engine has ended, whatever else goes wrong."""
        error = self._told_death()
        try:
            if error is None:
                for answer in job.answers:
                    answer.end("cancelled")
        except BaseException as fault:
            error = failure("the request failed", fault)
        try:
            self._close(job, error)
        except BaseException as fault:  # its reader has been told
            error = failure("the request failed", fault)
        for id in self._under_way(job):
            self._finished["error" if error else self.answers[id].finish_reason or "cancelled"] += 1
            del self.answers[id]

    def _told_death(self) -> RequestFailed | None:
        """A new one for each who waits: raised, it has a traceback of theirs."""
        return None if self._death is None else failure("the engine's thread died", self._death)

    def _step(self) -> bool:
        """One step; False at the engine's end.

        No variable here holds an answer: what a run raises keeps this frame.
        """
        with self.condition:
            while not (self.answers or self._calls or self.closing):
                self._last_step = time.monotonic()
                self.condition.wait(1.0)
            self._last_step = now = time.monotonic()
            if self.closing:
                return False
            gone = [id for id, answer in self.answers.items() if answer.job.feed.cancelled]
            for id in gone:
                self.scheduler.cancel(id)
                self._end(id, "cancelled")
            plan = self.scheduler.plan(now)
            for id in plan.expired:
                self._end(id, "timeout")
            calls, self._calls = self._calls, []  # last: where a fault ends the thread before, they're told
        ran = dict.fromkeys([*plan.decode, *(id for id, _ in plan.admit)])
        while calls:
            _answer_call(*calls.pop(0))
        shared = {id for _, id in plan.copies}
        for id, slot in plan.admit:
            self._admit(id, slot, now, shared=id in shared)
        for source, id in plan.copies:
            self.loop.share(self.answers[source], self.answers[id])
            ran[id] = None
        if plan.prefill is not None:
            self._prefill(*plan.prefill)
            ran[plan.prefill[0]] = None
        if plan.decode:
            began = time.monotonic()
            self.loop.decode([self.answers[id] for id in plan.decode])
            with self.condition:
                self.scheduler.decoded(time.monotonic() - began)
        self._settle(ran)
        return True

    def _admit(self, id: int, slot: int, now: float, *, shared: bool) -> None:
        answer = self.answers[id]
        if answer.job.feed.timing.started is None:
            answer.job.note(started=now)
        rows = self.loop.admit(answer, slot, shared=shared)
        with self.condition:
            if rows:
                self.scheduler.reused(id, rows)

    def _prefill(self, id: int, width: int) -> None:
        began = time.monotonic()
        done = self.loop.prefill(self.answers[id], width)
        with self.condition:
            if done:
                self.scheduler.prefilled(id, done, time.monotonic() - began)

    def _settle(self, ran: Iterable[int]) -> None:
        """Let go of the answers that ended in this step."""
        with self.condition:
            for id in ran:
                answer = self.answers.get(id)
                if answer is None:  # it went with another one of its request
                    continue
                error = self.loop.failed.get(answer)
                if error is not None:
                    self._fail(answer.job, error)
                elif answer.finish_reason is not None:
                    self.scheduler.finish(id)
                    self._end(id, answer.finish_reason)
                else:
                    answer.job.count()

    def _fail(self, job: Job, error: Exception) -> None:
        ids = self._under_way(job)
        for id in ids:
            self.scheduler.cancel(id)
            self.loop.end(self.answers[id])
        self._close(job, failure("the request failed", error))
        for id in ids:  # last, as in _end
            self._finished["error"] += 1
            self.loop.failed.pop(self.answers.pop(id), None)
        self.condition.notify_all()

    def _under_way(self, job: Job) -> list[int]:
        return [id for id, answer in self.answers.items() if answer.job is job]

    def _end(self, id: int, reason: FinishReason) -> None:
        answer = self.answers[id]
        answer.end(reason)
        self.loop.end(answer)
        if self._under_way(answer.job) == [id]:
            self._close(answer.job)
        self._finished[answer.finish_reason or reason] += 1
        del self.answers[id]  # last: where a fault ends the thread before, its reader is told
        self.condition.notify_all()

    def _close(self, job: Job, error: RequestFailed | None = None) -> None:
        """Tell a job's reader, and count its tokens; those of a prompt that nothing was computed of are none.

        Without effect where a reader has been told.
        """
        if job.feed.done:
            return
        try:
            job.close(error)
        finally:
            if job.feed.timing.started is not None:
                self._totals.update(vars(job.feed.usage))


def _answer_call(function: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del function, future  # the error holds this frame, and the future the error
