"""Many prompts at once, without a service: Ray Data over the machines of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4runtime.contract import UserError
from glm4runtime.engine import Engine, Request
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
    back with ``answer`` and ``finish_reason`` beside what they had, in any order.

    Raises UserError where Ray isn't installed, or a parameter is none.
    """
    require_ray()
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
        asked = [self._request(name, value) for value in batch[name]]
        results = [handle.result().choices[0] for handle in [self._engine.submit(request) for request in asked]]
        return {
            **batch,
            "answer": [choice.content for choice in results],
            "finish_reason": [choice.finish_reason for choice in results],
        }

    def _request(self, name: str, value: Any) -> Request:
        if name == "messages":
            return Request(messages=list(value), params=self._params)
        return Request(prompt=str(value), params=self._params)
