"""Many prompts at once, without a service: Ray Data over the machines of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glm4runtime.contract import UserError, shown
from glm4runtime.engine import Delta, Engine, EngineClosed, Handle, Request, RequestFailed
from glm4runtime.sampling import SamplingParams
from glm4serve.deploy.ray import require_ray

if TYPE_CHECKING:
    from ray.data import Dataset

_BATCH = 256  # rows that an engine gets at once: enough that its slots are seldom empty


def answers(
    rows: Dataset,
    bundle: str | Path,
    *,
    replicas: int,
    threads: int,
    slots: int = 8,
    gpus: float = 0.0,
    **params: Any,
) -> Dataset:
    """A dataset with an answer to each row's ``prompt``, or ``messages`` where rows have them.

    bundle: a folder that every machine has. replicas: engines, each with so many threads (as many CPUs are reserved),
    slots and GPUs. params: SamplingParams' fields; rows with the same seed and prompt get the same answer. Rows come
    back with ``answer``, ``finish_reason`` and ``error`` beside what they had, in any order. A row that can't be
    answered (its prompt is too long, say) has what is wrong with it as its error, and the others an empty one.

    Raises UserError where Ray isn't installed, or there is no such parameter.
    """
    require_ray()
    known = [field.name for field in fields(SamplingParams)]
    if unknown := sorted(params.keys() - set(known)):
        raise UserError(f"{', '.join(unknown)}: no such parameter; they are {', '.join(known)}")
    if threads < 1:
        raise UserError(f"threads={threads}: expected at least 1; Ray reserves as many CPUs")
    arguments = {"threads": threads, "slots": slots, "max_queue": _BATCH}
    return rows.map_batches(
        _Answers,
        fn_constructor_args=(Path(bundle).resolve(), arguments, SamplingParams(**params)),
        batch_size=_BATCH,
        concurrency=replicas,
        num_cpus=threads,
        num_gpus=gpus,
    )


class _Answers:
    """One engine."""

    def __init__(self, bundle: Path, arguments: dict[str, Any], params: SamplingParams) -> None:
        self._engine, self._params = Engine.load(bundle, **arguments), params

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        name = "messages" if "messages" in batch else "prompt"
        asked = [self._submit(name, value) for value in batch[name]]
        done = [each if isinstance(each, UserError) else self._answer(each) for each in asked]
        return {
            **batch,
            "answer": ["" if isinstance(each, UserError) else each.content for each in done],
            "finish_reason": ["error" if isinstance(each, UserError) else each.finish_reason for each in done],
            "error": [str(each) if isinstance(each, UserError) else "" for each in done],
        }

    def _submit(self, name: str, value: Any) -> Handle | UserError:
        """What is wrong with a row is that row's alone: the batches of all others don't end with it."""
        try:
            return self._engine.submit(self._request(name, value))
        except EngineClosed:
            raise
        except UserError as error:
            return error

    def _answer(self, handle: Handle) -> Delta | RequestFailed:
        try:
            return handle.result().choices[0]
        except RequestFailed as error:
            if self._engine.stats().death is not None:  # Ray puts another engine in the place of one that raises
                raise
            return error

    def _request(self, name: str, value: Any) -> Request:
        if name == "messages":
            if not isinstance(value, list | np.ndarray):
                raise UserError(f"messages: expected a list of objects, found {shown(value)}")
            return Request(messages=[_message(each) for each in value], params=self._params)
        if not isinstance(value, str):
            raise UserError(f"prompt: expected a text, found {shown(value)}")
        return Request(prompt=value, params=self._params)


def _message(given: Any) -> dict[str, Any]:
    """A row's message as it was before a column had it: without the fields that only others have, lists as lists."""
    if not isinstance(given, Mapping):
        raise UserError(f"messages: expected objects, found {shown(given)}")
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _message(value)
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value.tolist()]
    return [_plain(each) for each in value] if isinstance(value, list) else value
