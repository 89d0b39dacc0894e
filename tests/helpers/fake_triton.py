"""Triton's ``triton_python_backend_utils`` as far as our backend uses it, and requests whose responses are kept."""

from __future__ import annotations

import json
import threading
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors, self.error = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}, error


class TritonModelException(Exception):
    pass


class MetricFamily:
    GAUGE, COUNTER = "gauge", "counter"
    values: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, text: str, kind: str) -> None:
        self._name = name

    def Metric(self, labels: dict[str, str]) -> MetricFamily:
        self.values[self._name] = 0
        return self

    def set(self, value: float) -> None:
        self.values[self._name] = value

    def increment(self, value: float) -> None:
        assert value >= 0
        self.values[self._name] += value


class Logger:
    errors: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, text: str) -> None:
        cls.errors.append(text)


def module() -> ModuleType:
    made = ModuleType("triton_python_backend_utils")
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    for kind in (Tensor, TritonError, InferenceResponse, TritonModelException, MetricFamily, Logger):
        setattr(made, kind.__name__, kind)
    return made


class Sender:
    """Refuses what Triton refuses: anything behind the final flag. ``threads``: those that sent."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.final, self.begun = threading.Event(), threading.Event()
        self.cancelled = False
        self.threads: set[int] = set()

    def is_cancelled(self) -> bool:
        assert not self.final.is_set()
        return self.cancelled

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.final.is_set()
        self.threads.add(threading.get_ident())
        if response is not None:
            self.responses.append(response)
            self.begun.set()
        if flags == FINAL:
            self.final.set()

    def wait(self) -> Sender:
        assert self.final.wait(60)
        return self

    def texts(self, name: str = "text_output") -> list[str]:
        return [response.tensors[name][0].decode() for response in self.responses]

    def ids(self) -> list[int]:
        return [token for response in self.responses for token in response.tensors["token_ids"].tolist()]

    def errors(self) -> list[tuple[str, str]]:
        return [(r.error.code, r.error.message) for r in self.responses if r.error is not None]


class Request:
    def __init__(
        self, inputs: dict[str, np.ndarray], parameters: dict[str, Any] | None = None, microseconds: int = 0
    ) -> None:
        self._inputs, self._parameters, self._microseconds = inputs, parameters, microseconds
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def timeout(self) -> int:
        return self._microseconds
