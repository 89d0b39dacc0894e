"""Requests to our model by tritonclient's gRPC stream and by HTTP, and the engine's requests that they mean."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from glm4serve.deploy.triton.tensors import INPUTS

NUMPY = {"TYPE_INT64": np.int64, "TYPE_FP64": np.float64, "TYPE_BOOL": np.bool_, "TYPE_STRING": np.object_}
WIRE = {"TYPE_INT64": "INT64", "TYPE_FP64": "FP64", "TYPE_BOOL": "BOOL", "TYPE_STRING": "BYTES"}


@dataclass
class Answer:
    """What came, joined by choice."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    responses: int = 0
    error: str | None = None

    def add(self, found: dict[str, Any]) -> None:
        index = int(found["index"])
        self.responses += 1
        self.texts[index] = self.texts.get(index, "") + found["text_output"]
        self.tokens.setdefault(index, []).extend(found["token_ids"])
        self.calls += json.loads(found["tool_calls"])
        self.logprobs += json.loads(found["logprobs"])
        if found["finish_reason"]:
            self.reasons[index] = found["finish_reason"]


def tensors(given: dict[str, Any]) -> list[triton.InferInput]:
    """Inputs by name; lists and objects of JSON are given as text."""
    made = []
    for name, value in given.items():
        tensor = INPUTS[name]
        items = value if tensor.length == -1 else [value]
        if tensor.data_type == "TYPE_STRING":
            items = [item if isinstance(item, bytes) else item.encode() for item in items]
        array = np.array(items, dtype=NUMPY[tensor.data_type])
        made.append(triton.InferInput(name, list(array.shape), WIRE[tensor.data_type]))
        made[-1].set_data_from_numpy(array)
    return made


class Stream:
    """One gRPC stream with one request."""

    def __init__(self, address: str, model: str, given: dict[str, Any]) -> None:
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = triton.InferenceServerClient(address)
        self._client.start_stream(lambda result, error: self._queue.put((result, error)))
        self._client.async_stream_infer(model, tensors(given), enable_empty_final_response=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Responses' tensors up to the final flag. Raises InferenceServerException."""
        while True:
            result, error = self._queue.get(timeout=120)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                found = {output.name: result.as_numpy(output.name).tolist() for output in response.outputs}
                one = {name: values[0] for name, values in found.items() if name != "token_ids"}
                texts = {name: value.decode() for name, value in one.items() if isinstance(value, bytes)}
                yield {**found, **one, **texts}
            if response.parameters["triton_final_response"].bool_param:
                return

    def read(self) -> Answer:
        """All of it, with the error where it ends with one."""
        answer = Answer()
        try:
            for found in self:
                answer.add(found)
        except InferenceServerException as error:
            answer.error = str(error)
        self.close()
        return answer

    def close(self, cancel: bool = False) -> None:
        """End the stream. cancel: without waiting for what is under way."""
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def generate(port: int, model: str, given: dict[str, Any], *, leave_after: int | None = None) -> tuple[int, Answer]:
    """HTTP's generate_stream where ``stream`` is given, generate elsewhere: status and answer.

    leave_after: close the connection after so many responses.
    """
    path = "generate_stream" if given.get("stream") else "generate"
    body = json.dumps(given).encode()
    head = f"POST /v2/models/{model}/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    answer = Answer()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection, connection.makefile("rb") as reader:
        connection.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        status = int(reader.readline().split()[1])
        lines = iter(reader.readline, b"")
        for line in lines:
            text = line.decode().removeprefix("data: ").strip()
            if not text.startswith("{"):
                continue
            found = json.loads(text)
            if "error" in found:
                answer.error = found["error"]
                continue
            if not isinstance(found["token_ids"], list):  # Triton writes one value without brackets
                found["token_ids"] = [found["token_ids"]]
            answer.add(found)
            if answer.responses == leave_after:
                break
    return status, answer
