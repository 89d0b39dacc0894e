"""Many requests at once on one bundle: the front door for services."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.huge_pages import collapse
from glm4runtime.backends.providers import open_batch_runner
from glm4runtime.backends.settings import Provider, Settings, require_path, require_slots
from glm4runtime.contract import Manifest, UserError, read_manifest, wrong_task
from glm4runtime.engine import prefix_file
from glm4runtime.engine.draft import Draft
from glm4runtime.engine.draft_bundle import read_draft
from glm4runtime.engine.handle import Handle
from glm4runtime.engine.identity import identity_of
from glm4runtime.engine.loop import Loop
from glm4runtime.engine.prefix import PrefixStore, block_for
from glm4runtime.engine.prepare import Preparation
from glm4runtime.engine.request import Request
from glm4runtime.engine.scheduler import Scheduler
from glm4runtime.engine.settings import EngineSettings, PrefixCache
from glm4runtime.engine.stats import EngineStats
from glm4runtime.engine.worker import Worker
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.files import read_text_files

T = TypeVar("T")


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
        device_id: int | Sequence[int] = 0,
        gpu_mem_limit: float | None = None,
        cuda_graphs: bool = False,
        chat_template: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        prefix_cache: PrefixCache = "prompt",
        prefix_cache_bytes: int = 1 << 30,
        max_queue: int = 64,
        stall_ms: float = 200.0,
        draft: str | Path | None = None,
    ) -> Engine:
        """Open a bundle that ``glm4export build`` made; arguments that :func:`glm4runtime.load` has are the same here.

        slots: sequences at once; each has a cache of max_seq_len tokens, whose memory is taken now. A bundle for
        TensorRT needs an engine that was built with ``--max-batch`` of as many. invariant: see the class; without it
        lone streams in int8 and int4 are up to a fifth faster, and engines of TensorRT run only without. adapters:
        requests choose one, or none; a step in which some use one reads all of them, so load no others. prefix_cache:
        keep the cache rows of prompts (``prompt``), of answers too (``all``: next turns are faster, but have the bits
        of decode steps), or none (``off``). prefix_cache_bytes: memory for them, the least recently used go first.
        max_queue: requests that may wait for a slot. stall_ms: how long a new prompt may hold up answers under way, in
        milliseconds. draft: the bundle of a smaller model with the same tokenizer, for requests with ``draft``; it gets
        as many slots, and as much cache as its positions allow, on the first device of several.

        Raises BundleError where the folder isn't a whole bundle of this format, UserError for settings that don't fit.
        """
        opening = Settings(
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk,
            check_hashes=check_hashes,
            invariant=invariant,
            huge_pages=huge_pages,
            device_id=device_id,
            gpu_mem_limit=gpu_mem_limit,
            cuda_graphs=cuda_graphs,
            adapters=adapters,
        )
        settings = EngineSettings(prefix_cache, prefix_cache_bytes, max_queue, stall_ms)
        require_slots(slots)
        require_path("bundle", bundle)
        folder = Path(bundle)
        manifest = read_manifest(folder, check_hashes=check_hashes)
        if manifest.kv_cache is None:
            raise wrong_task(folder, manifest.task)
        text = BundleText(folder, read_text_files(folder), chat_template)
        drafting = None
        if draft is not None:
            drafting = read_draft(draft, manifest, text, check_hashes=check_hashes)
            opening = drafting.leave_room(opening, slots)
        runner = open_batch_runner(folder, manifest, opening, slots=slots)
        try:
            opened = None if drafting is None else drafting.open(runner, stall_seconds=stall_ms / 1000)
        except BaseException:
            runner.close()
            raise
        if huge_pages:
            collapse()
        return cls(runner, text, settings, draft=opened)

    def __init__(
        self, runner: BatchRunner, text: BundleText, settings: EngineSettings, *, draft: Draft | None = None
    ) -> None:
        """Start the thread. runner, draft: this engine's own from now on."""
        self.manifest: Manifest = runner.manifest
        self.max_seq_len = runner.max_seq_len
        self.folder, self.runner, self._text = text.folder, runner, text
        self._has_draft = draft is not None
        self._preparation = Preparation(runner, text, drafts=self._has_draft)
        scheduler = Scheduler(
            runner.slots,
            max_queue=settings.max_queue,
            prefill_chunk=runner.prefill_chunk,
            prompt_grid=runner.prompt_grid,
            stall_seconds=settings.stall_ms / 1000,
        )
        self._store = store = None if settings.prefix_cache == "off" else _store(runner, settings.prefix_cache_bytes)
        self._worker = Worker(scheduler, Loop(runner, store, keep_answers=settings.prefix_cache == "all", draft=draft))
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
        self._worker.require_open()  # before the template's process is started again
        try:
            job = self._preparation.job(request, now)
            deadline = None if request.timeout is None else now + request.timeout
            handle = Handle(job.feed)  # first, so that an interrupt from here on cancels the request
            self._worker.submit(job, deadline)
        except UserError:
            if self._worker.closing:
                self._text.close()  # which preparing a conversation may have opened again
            self._worker.require_open()  # that the template was closed meanwhile is no fault of the request's
            raise
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
        return self._has_draft

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
        return self._worker.stats()

    def eta(self) -> float:
        """Seconds that a request submitted now would wait for a slot, by measured speeds; 0 where it wouldn't."""
        return self._worker.eta()

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
        return self._worker.call(function)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; False where some are left after ``timeout`` seconds."""
        return self._worker.drain(timeout)

    def close(self) -> None:
        """End the thread, and free graphs and cache. Requests under way end as ``cancelled``. Again: no effect."""
        self._worker.close()
        self._text.close()
        _OPEN.discard(self)

    def _require_store(self) -> PrefixStore:
        if self._store is None:
            raise UserError("this engine keeps no prefixes: it was loaded with prefix_cache='off'")
        return self._store


def _store(runner: BatchRunner, size: int) -> PrefixStore:
    return PrefixStore(size, runner.row_bytes, identity=identity_of(runner), block=block_for(runner.prompt_grid))


_OPEN: set[Engine] = set()  # until they are closed: requests go on where only their handles are kept


def _after_fork() -> None:
    for engine in list(_OPEN):
        engine._worker.forked()


os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _close_all() -> None:
    for engine in list(_OPEN):
        engine.close()
