"""Many requests at once on one bundle: the front door for services."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.huge_pages import collapse
from glm4runtime.backends.providers import Provider, open_batch_runner, require_settings
from glm4runtime.contract import Manifest, UserError, read_manifest, shown, wrong_task
from glm4runtime.engine import prefix_file
from glm4runtime.engine.draft import Draft
from glm4runtime.engine.draft_bundle import open_draft, read_draft
from glm4runtime.engine.handle import Handle, RequestFailed
from glm4runtime.engine.identity import identity_of
from glm4runtime.engine.job import Answer, Job
from glm4runtime.engine.loop import Loop
from glm4runtime.engine.prefix import PrefixStore, block_for
from glm4runtime.engine.prepare import Preparation
from glm4runtime.engine.request import Request
from glm4runtime.engine.scheduler import Scheduler
from glm4runtime.engine.stats import EngineStats
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.files import read_text_files

T = TypeVar("T")
PrefixCache = Literal["prompt", "all", "off"]
_FAILURES = 3  # runs that fail one after the other: from then on the engine isn't healthy


class EngineClosed(UserError):
    """The engine takes no more requests: it is draining, closed, or its thread has died."""


class Engine:
    """A bundle in memory with slots for several sequences. Any thread may submit and cancel.

    One thread of its own computes: see :mod:`glm4runtime.engine.loop`. With ``invariant`` a request's tokens and
    log-probabilities have the same bits whatever runs beside it and whatever the prefix cache holds.
    """

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        slots: int = 8,
        provider: Provider | None = None,
        threads: int = 0,
        max_seq_len: int | None = None,
        prefill_chunk: int | None = None,
        check_hashes: bool = False,
        invariant: bool = True,
        huge_pages: bool = False,
        device_id: int = 0,
        gpu_mem_limit: float | None = None,
        chat_template: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        prefix_cache: PrefixCache = "prompt",
        prefix_cache_bytes: int = 1 << 30,
        max_queue: int = 64,
        stall_ms: float = 200.0,
        draft: str | Path | None = None,
    ) -> Engine:
        """Open a bundle that ``glm4export build`` made; arguments that :func:`glm4runtime.load` has are the same here.

        slots: sequences at once; each has a cache of max_seq_len tokens, whose memory is taken now. invariant: see the
        class; without it lone streams in int8 and int4 are up to a fifth faster. adapters: requests choose one, or
        none; a step in which some use one reads all of them, so load no others. prefix_cache: keep the cache rows of
        prompts (``prompt``), of answers too (``all``: next turns are faster, but have the bits of decode steps), or
        none (``off``). prefix_cache_bytes: memory for them, the least recently used go first. max_queue: requests that
        may wait for a slot. stall_ms: how long a new prompt may hold up answers under way, in milliseconds. draft: the
        bundle of a smaller model with the same tokenizer, for requests with ``draft``; it gets as many slots, and as
        much cache as its positions allow.

        Raises BundleError where the folder isn't a whole bundle of this format, UserError for settings that don't fit.
        """
        require_settings(
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk,
            check_hashes=check_hashes,
            invariant=invariant,
            huge_pages=huge_pages,
            adapters=adapters,
        )
        if not isinstance(bundle, str | os.PathLike):
            raise UserError(f"bundle={shown(bundle)} is not the path of a folder")
        if prefix_cache not in get_args(PrefixCache):
            raise UserError(f"prefix_cache={shown(prefix_cache)}: expected {', '.join(get_args(PrefixCache))}")
        folder = Path(bundle)
        manifest = read_manifest(folder, check_hashes=check_hashes)
        if manifest.kv_cache is None:
            raise wrong_task(folder, manifest.task)
        text = BundleText(folder, read_text_files(folder), chat_template)
        drafting = None if draft is None else read_draft(draft, manifest, text, check_hashes=check_hashes)
        runner = open_batch_runner(
            folder,
            manifest,
            slots=slots,
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk,
            check_hashes=check_hashes,
            invariant=invariant,
            adapters=adapters,
            device_id=device_id,
            gpu_mem_limit=gpu_mem_limit,
        )
        opened = None
        if draft is not None and drafting is not None:
            opened = open_draft(
                draft,
                drafting,
                runner,
                provider=provider,
                threads=threads,
                check_hashes=check_hashes,
                device_id=device_id,
                stall_seconds=stall_ms / 1000,
            )
        if huge_pages:
            collapse()
        return cls(
            runner,
            text,
            draft=opened,
            prefix_cache=prefix_cache,
            prefix_cache_bytes=prefix_cache_bytes,
            max_queue=max_queue,
            stall_ms=stall_ms,
        )

    def __init__(
        self,
        runner: BatchRunner,
        text: BundleText,
        *,
        draft: Draft | None = None,
        prefix_cache: PrefixCache = "prompt",
        prefix_cache_bytes: int = 1 << 30,
        max_queue: int = 64,
        stall_ms: float = 200.0,
    ) -> None:
        """Start the thread. runner, draft: this engine's own from now on. Others as :meth:`load`'s."""
        self.manifest: Manifest = runner.manifest
        self.max_seq_len = runner.max_seq_len
        self.folder, self.runner, self._text = text.folder, runner, text
        self._preparation = Preparation(runner, text, drafts=draft is not None)
        self._scheduler = Scheduler(
            runner.slots,
            max_queue=max_queue,
            prefill_chunk=runner.prefill_chunk,
            prompt_grid=runner.prompt_grid,
            stall_seconds=stall_ms / 1000,
        )
        store = None
        if prefix_cache != "off":
            block = block_for(runner.prompt_grid)
            store = PrefixStore(prefix_cache_bytes, runner.row_bytes, identity=identity_of(runner), block=block)
        self._store = store
        self._loop = Loop(runner, store, keep_answers=prefix_cache == "all", draft=draft)
        self._condition = threading.Condition()  # guards what follows; never held while a graph runs
        self._ids = itertools.count()
        self._answers: dict[int, Answer] = {}  # by the scheduler's id
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._draining = self._closing = False
        self._death: BaseException | None = None
        self._last_step = time.monotonic()
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="glm4-engine", daemon=True)
        self._thread.start()
        _OPEN.add(self)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> Handle:
        """Have a request answered; returns at once. Prompt and grammar are made ready in the calling thread.

        Raises UserError for what can't be answered (a prompt that is too long: PromptTooLong), QueueFull where as many
        wait as may, EngineClosed where no more are taken.
        """
        now = time.monotonic()
        with self._condition:
            self._require_open()  # before the template's process is started again
        job = self._preparation.job(request, now)
        deadline = None if request.timeout is None else now + request.timeout
        handle = Handle(job.feed)  # first, so that an interrupt from here on cancels the request
        with self._condition:
            if self._closing:
                self._text.close()  # which preparing a conversation may have opened again
            self._require_open()
            self._queue(job, deadline)
            self._condition.notify_all()
        return handle

    def generate(self, request: Request) -> Handle:
        """The same: iterate over what it returns, ``for`` or ``async for``."""
        return self.submit(request)

    @property
    def adapters(self) -> Mapping[str, str]:
        """The adapters that were loaded: sha256 of what each holds, by what :attr:`Request.adapter` may be."""
        return self.runner.adapters

    @property
    def has_draft(self) -> bool:
        """Whether a draft bundle was loaded, so that :attr:`Request.draft` may be more than 0."""
        return self._loop.draft is not None

    @property
    def tokenizer(self) -> Any:
        """The bundle's tokenizer. Raises BundleError where it has none."""
        return self._text.tokenizer

    @property
    def template(self) -> Any:
        """The chat template. Raises UserError where there's none."""
        return self._text.template

    def stats(self) -> EngineStats:
        """The numbers of this moment."""
        with self._condition:
            return EngineStats(
                healthy=self._death is None
                and not self._closing
                and self._thread.is_alive()
                and self._loop.failures_in_a_row < _FAILURES,
                death=None if self._death is None else _told(self._death),
                last_step_age=time.monotonic() - self._last_step,
                slots=self.runner.slots,
                scheduler=self._scheduler.stats(),
                prompt_tokens=self._totals["prompt"],
                cached_tokens=self._totals["cached"],
                completion_tokens=self._totals["completion"],
                drafted_tokens=self._totals["drafted"],
                accepted_tokens=self._totals["accepted"],
                finished=dict(self._finished),
                prefixes=None if self._store is None else self._store.stats(),
            )

    def eta(self) -> float:
        """Seconds that a request submitted now would wait for a slot, by measured speeds; 0 where it wouldn't."""
        with self._condition:
            return self._scheduler.eta()

    def save_prefixes(self, path: str | Path) -> None:
        """Write the prefix cache to a file, for :meth:`restore_prefixes` of the same bundle. Runs go on behind it.

        Raises UserError where there is none, or the file can't be written.
        """
        store = self._require_store()
        self.call(lambda: prefix_file.save(store, Path(path)))

    def restore_prefixes(self, path: str | Path) -> int:
        """Take in what :meth:`save_prefixes` wrote; returns how many tokens. Raises UserError for any other file."""
        store = self._require_store()
        return self.call(lambda: prefix_file.restore(store, Path(path)))

    def call(self, function: Callable[[], T]) -> T:
        """Have the engine's thread call a function between two steps, and wait for what it returns or raises.

        Nothing else is computed meanwhile: for measurements, and for looking at :attr:`runner`.
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        with self._condition:
            self._require_thread()
            self._calls.append((function, future))
            self._condition.notify_all()
        return future.result()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; False where some are left after ``timeout`` seconds."""
        with self._condition:
            self._draining = True
            return self._condition.wait_for(lambda: not self._answers or self._death is not None, timeout)

    def close(self) -> None:
        """End the thread, and free graphs and cache. Requests under way end as ``cancelled``. Again: no effect."""
        with self._condition:
            self._draining = self._closing = True
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()  # at once in a forked child
        self._text.close()
        _OPEN.discard(self)

    def _queue(self, job: Job, deadline: float | None) -> None:
        """Have all of a job's answers wait for slots, or none of them."""
        key, tokens, limit = job.request.key, len(job.ids), job.request.params.max_new_tokens
        ids: list[int] = []
        try:
            for answer in job.answers:
                id, parent = next(self._ids), ids[0] if ids else None
                together = job.beams is not None and parent is not None
                ids.append(id)
                self._answers[id] = answer  # the scheduler knows none that isn't here, wherever an interrupt comes
                self._scheduler.submit(id, key, tokens, limit, deadline=deadline, parent=parent, together=together)
        except BaseException:
            for id in ids:
                self._scheduler.cancel(id)
                self._answers.pop(id, None)
            raise

    def _require_thread(self) -> None:
        if self._death is not None:
            raise EngineClosed(f"the engine's thread has died: {_told(self._death)}; load the bundle again")
        if self._closing:
            raise EngineClosed("the engine is closed; load the bundle again")

    def _require_open(self) -> None:
        self._require_thread()
        if self._draining:
            raise EngineClosed("the engine takes no more requests: it is being drained, to be closed then")

    def _require_store(self) -> PrefixStore:
        if self._store is None:
            raise UserError("this engine keeps no prefixes: it was loaded with prefix_cache='off'")
        return self._store

    def _forked(self) -> None:
        """In a child: the thread isn't here, and may have held the lock."""
        self._condition = threading.Condition()
        self._death = UserError("the process forked, and threads stay in the parent")

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # a fault of ours: nobody may wait for it
            self._death = error
        finally:
            with self._condition:
                reason = None if self._death is None else _failure("the engine's thread died", self._death)
                for job in {id(answer.job): answer.job for answer in self._answers.values()}.values():
                    _give_up(job, reason)
                self._answers.clear()
                for _, future in self._calls:
                    future.set_exception(reason or EngineClosed("the engine was closed"))
                self._calls.clear()
                self._condition.notify_all()
            self._loop.close()

    def _step(self) -> bool:
        """One step; False at the engine's end."""
        with self._condition:
            while not (self._answers or self._calls or self._closing):
                self._last_step = time.monotonic()
                self._condition.wait(1.0)
            self._last_step = now = time.monotonic()
            if self._closing:
                return False
            calls, self._calls = self._calls, []
            gone = [id for id, answer in self._answers.items() if answer.job.feed.cancelled]
            for id in gone:
                self._scheduler.cancel(id)
                self._end(id, "cancelled")
            plan = self._scheduler.plan(now)
            for id in plan.expired:
                self._end(id, "timeout")
        ran = dict.fromkeys([*plan.decode, *(id for id, _ in plan.admit)])
        for function, future in calls:
            _answer_call(function, future)
        shared = {id for _, id in plan.copies}
        for id, slot in plan.admit:
            answer = self._answers[id]
            if answer.job.feed.timing.started is None:
                answer.job.note(started=now)
            self._admit(id, answer, slot, shared=id in shared)
        for source, id in plan.copies:
            self._loop.share(self._answers[source], self._answers[id])
            ran[id] = None
        if plan.prefill is not None:
            self._prefill(*plan.prefill)
            ran[plan.prefill[0]] = None
        if plan.decode:
            began = time.monotonic()
            self._loop.decode([self._answers[id] for id in plan.decode])
            with self._condition:
                self._scheduler.decoded(time.monotonic() - began)
        self._settle(ran)
        return True

    def _admit(self, id: int, answer: Answer, slot: int, *, shared: bool) -> None:
        rows = self._loop.admit(answer, slot, shared=shared)
        with self._condition:
            if rows:
                self._scheduler.reused(id, rows)

    def _prefill(self, id: int, width: int) -> None:
        began = time.monotonic()
        done = self._loop.prefill(self._answers[id], width)
        with self._condition:
            if done:
                self._scheduler.prefilled(id, done, time.monotonic() - began)

    def _settle(self, ran: Iterable[int]) -> None:
        """Let go of the answers that ended in this step."""
        with self._condition:
            for id in ran:
                answer = self._answers.get(id)
                if answer is None:  # it went with another one of its request
                    continue
                error = self._loop.failed.pop(answer, None)
                if error is not None:
                    self._fail(answer.job, error)
                elif answer.finish_reason is not None:
                    self._scheduler.finish(id)
                    self._end(id, answer.finish_reason)
                else:
                    answer.job.count()

    def _fail(self, job: Job, error: Exception) -> None:
        for id in [id for id, answer in self._answers.items() if answer.job is job]:
            self._scheduler.cancel(id)
            self._loop.end(answer := self._answers.pop(id))
            self._loop.failed.pop(answer, None)
            self._finished["error"] += 1
        job.close(_failure("the request failed", error))
        self._condition.notify_all()

    def _end(self, id: int, reason: Any) -> None:
        answer = self._answers.pop(id)
        answer.finish(reason)
        self._loop.end(answer)
        self._finished[answer.finish_reason or reason] += 1
        job = answer.job
        if job.finished:
            job.close()
            usage = job.feed.usage
            self._totals.update(
                prompt=usage.prompt_tokens,
                cached=usage.cached_tokens,
                completion=usage.completion_tokens,
                drafted=usage.drafted_tokens,
                accepted=usage.accepted_tokens,
            )
        self._condition.notify_all()


def _answer_call(function: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _give_up(job: Job, reason: Exception | None) -> None:
    """Tell a job's reader that the engine has ended."""
    try:
        if reason is None:
            for answer in job.answers:
                answer.finish("cancelled")
        job.close(reason)
    except Exception as error:  # the others are to be told nevertheless
        job.feed.end(None, _failure("the request failed", error))


def _failure(what: str, error: BaseException) -> RequestFailed:
    failure = RequestFailed(f"{what}: {_told(error)}")
    failure.__cause__ = error
    return failure


def _told(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).splitlines() or ["no message"]  # MemoryError has none
    return f"{type(error).__name__}: {lines[0]:.300}"


_OPEN: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_OPEN):
        engine._forked()


os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _close_all() -> None:
    for engine in list(_OPEN):
        engine.close()
