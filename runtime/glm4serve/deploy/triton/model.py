"""Triton's Python backend over an engine: as many requests at once as it has slots.

Triton runs this file from a model's folder in its repository. Beside it lie tensors.py and the bundle; config.pbtxt's
parameters with names in small letters are :meth:`glm4runtime.Engine.load`'s, but for ``drain``. Paths begin here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from glm4runtime.contract import BundleError, UserError, shown
from glm4runtime.engine import Delta, Engine, EngineClosed, Handle, QueueFull, RequestFailed

from .tensors import Asked, read_request, response_tensors

_LOOK = 0.05  # seconds between two looks at who has gone away
_COUNT = 0.5  # between two updates of the metrics
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_OF_TRITON = ("triton_", "binary_data_output", "sequence_")  # request parameters that clients' libraries add


class TritonPythonModel:
    """What Triton calls.

    ``execute`` returns at once, or requests would wait for one another. Prompts are made ready by a few threads. One
    thread sends all responses, and looks which clients have gone: Triton only tells when it's asked.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine. args: Triton's, of which ``model_config`` is read, config.pbtxt as JSON."""
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: _setting(value["string_value"]) for name, value in parameters.items() if name.islower()}
        self._drain, here = settings.pop("drain"), Path(__file__).parent
        if "draft" in settings:
            settings["draft"] = here / settings["draft"]
        if "adapters" in settings:
            settings["adapters"] = {name: here / file for name, file in settings["adapters"].items()}
        self._engine = Engine.load(here / "bundle", **settings)
        self._numbers = _Numbers(args["model_name"])
        self._under_way: dict[int, tuple[Any, Handle]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(4, "glm4-prompts")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="glm4-responses", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Have requests answered. Their tensors are read here: Triton frees them."""
        for request in requests:
            sender = request.get_response_sender()
            asked: Asked | Exception
            try:
                asked = _read(request)
            except Exception as error:
                asked = error
            self._loop.call_soon_threadsafe(self._begin, sender, asked)

    def finalize(self) -> None:
        """Close once answers are whole, or after ``drain`` seconds; those that are left end with an error.

        Triton doesn't wait for them by itself: for it a request is over when ``execute`` returns.
        """
        self._engine.drain(self._drain)
        self._engine.close()
        asyncio.run_coroutine_threadsafe(self._settled(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._pool.shutdown()

    # What follows runs in the thread that sends.

    def _run(self) -> None:
        watch = self._loop.create_task(self._watch())
        self._loop.run_forever()
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(watch)
        self._loop.close()

    def _begin(self, sender: Any, asked: Asked | Exception) -> None:
        task = self._loop.create_task(self._answer(sender, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settled(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _watch(self) -> None:
        counted = 0.0
        while True:
            if self._loop.time() - counted >= _COUNT:
                self._numbers.update(self._engine)
                counted = self._loop.time()
            for sender, handle in list(self._under_way.values()):
                if sender.is_cancelled():
                    handle.cancel()
            await asyncio.sleep(_LOOK)

    async def _answer(self, sender: Any, asked: Asked | Exception) -> None:
        """Send all of an answer, or an error. Whatever happens, the final flag is sent: Triton waits for it."""
        try:
            if isinstance(asked, Exception):
                raise asked
            handle = await self._loop.run_in_executor(self._pool, self._engine.submit, asked.request)
            with handle:
                self._under_way[id(sender)] = sender, handle
                if asked.stream:
                    async for delta in handle:
                        _send(sender, delta, handle)
                else:
                    for delta in (await handle.result_async()).choices:
                        _send(sender, delta, handle)
        except Exception as error:
            sender.send(pb_utils.InferenceResponse(error=_told(error)))
        finally:
            self._under_way.pop(id(sender), None)
            sender.send(flags=_FINAL)


class _Numbers:
    """The engine's, on Triton's metrics port, by the names that the HTTP service has for them."""

    _FAMILIES = (
        ("num_requests_running", "GAUGE", "Answers that have a slot."),
        ("num_requests_waiting", "GAUGE", "Answers that wait for one."),
        ("engine_last_step_age_seconds", "GAUGE", "Since the engine last came round; it grows where the engine died."),
        ("prompt_tokens_total", "COUNTER", "Prompt tokens of requests that got a slot and have ended."),
        ("generation_tokens_total", "COUNTER", "Tokens written for them, failed ones too."),
    )

    def __init__(self, model: str) -> None:
        self._metrics: list[tuple[Any, Any]] = []  # each with its family, which must live as long
        self._totals, self._told = [0, 0], False
        with contextlib.suppress(pb_utils.TritonModelException):  # the server was started without metrics
            for name, kind, text in self._FAMILIES:
                family = pb_utils.MetricFamily(f"glm4:{name}", text, getattr(pb_utils.MetricFamily, kind))
                self._metrics.append((family.Metric({"model_name": model}), family))

    def update(self, engine: Engine) -> None:
        stats = engine.stats()
        if stats.death is not None and not self._told:
            self._told = True  # Triton goes on calling the model ready
            pb_utils.Logger.log_error(f"glm4: the engine died: {stats.death}; unload the model and load it again")
        if not self._metrics:
            return
        totals = [stats.prompt_tokens, stats.completion_tokens]
        (running, _), (waiting, _), (age, _), *counters = self._metrics
        running.set(stats.scheduler.running)
        waiting.set(stats.scheduler.waiting)
        age.set(stats.last_step_age)
        for (counter, _), before, now in zip(counters, self._totals, totals, strict=True):
            counter.increment(now - before)
        self._totals = totals


class _Cancelled(Exception):
    """An answer was ended from outside."""


def _setting(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read(request: Any) -> Asked:
    """Raises UserError. What HTTP's generate finds no input for it makes a request's parameter: that is a mistake."""
    for name in json.loads(request.parameters() or "{}"):
        if not name.startswith(_OF_TRITON):
            raise UserError(f"{shown(name)}: no such input, and parameters have no effect; see docs/triton.md")
    microseconds = request.timeout()
    tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    return read_request(tensors, microseconds / 1e6 if microseconds else None)


def _send(sender: Any, delta: Delta, handle: Handle) -> None:
    if delta.finish_reason == "cancelled":
        raise _Cancelled("the request was cancelled")
    tensors = [pb_utils.Tensor(name, array) for name, array in response_tensors(delta, handle.usage).items()]
    sender.send(pb_utils.InferenceResponse(output_tensors=tensors))


def _told(error: Exception) -> Any:
    """The error as a client gets it; nothing of our folders, or of faults of ours: those are logged."""
    kinds = pb_utils.TritonError
    if isinstance(error, _Cancelled):
        return kinds(str(error), kinds.CANCELLED)
    if isinstance(error, QueueFull):
        return kinds(str(error), kinds.UNAVAILABLE)
    if isinstance(error, EngineClosed):  # why is in the log
        return kinds("the model takes no requests now: it is being closed, or has failed", kinds.UNAVAILABLE)
    if isinstance(error, RequestFailed) and isinstance(error.__cause__, UserError):
        return kinds(str(error), kinds.INTERNAL)
    if isinstance(error, UserError) and not isinstance(error, BundleError | RequestFailed):
        return kinds(str(error), kinds.INVALID_ARG)
    pb_utils.Logger.log_error(f"glm4: {type(error).__name__}: {error}")
    return kinds("the server failed on this request; its log says more", kinds.INTERNAL)
