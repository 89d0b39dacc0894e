"""One line of a batch: a request in, an answer out."""

from __future__ import annotations

import secrets
import sys
import traceback
from contextlib import ExitStack
from hashlib import sha256
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from glm4runtime.contract import UserError
from glm4runtime.engine import EngineClosed, RequestFailed
from glm4serve.batch.requests import MOST_BYTES, RequestLine
from glm4serve.errors import ApiError, invalid, openai_shape, told
from glm4serve.models import Models
from glm4serve.openai.chat_request import ChatRequest
from glm4serve.openai.completion_request import CompletionRequest
from glm4serve.openai.embedding_request import EmbeddingRequest
from glm4serve.schema import Strict, read_json

Body = ChatRequest | CompletionRequest | EmbeddingRequest

_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
M = TypeVar("M", bound=Strict)


class _Line(Strict):
    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class Parsed:
    """A line that was read: either a request, or what is wrong with it."""

    def __init__(self, line: RequestLine, seen: set[bytes]) -> None:
        """seen: digests of the custom_ids of lines before; this one's is added."""
        self.custom_id: str | None = None
        self.request: _Line | None = None
        self.error: ApiError | None = None
        try:
            if line.data is None:
                raise ApiError(400, f"the line has more than {MOST_BYTES >> 20} MiB", code="line_too_long")
            self.request = self._read(line.data)
        except ApiError as error:
            self.error = error
            return
        digest = sha256(self.request.custom_id.encode()).digest()[:16]
        if digest in seen:
            self.error = ApiError(
                400, "custom_id: a line before has the same", code="duplicate_custom_id", param="custom_id"
            )
        seen.add(digest)

    def _read(self, data: bytes) -> _Line:
        try:
            value = read_json(data)
        except ValueError as error:
            raise ApiError(400, f"not valid JSON: {error}", code="invalid_json") from None
        if isinstance(value, dict) and isinstance(value.get("custom_id"), str):
            self.custom_id = value["custom_id"]
        return _validated(_Line, value)


class Answerer:
    """Answers lines with models. Several threads may ask where text is generated; embeddings are one thread's."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def answer(self, id: str, line: Parsed) -> dict[str, Any]:
        """The answer's line. Raises EngineClosed where no more are answered."""
        if line.request is None or line.error is not None:
            error = line.error or ApiError(500, "the line was not read")
            return _answer(id, line.custom_id, None, {"code": error.code, "message": error.message})
        param = None
        try:
            body = _validated(_body_of(line.request.url), line.request.body)
            if isinstance(body, EmbeddingRequest):
                param = "input"
                found = self._embeddings(body)
            else:
                param = body.prompt_field
                found = self._text(body)
        except EngineClosed:
            raise
        except Exception as error:
            if not isinstance(error, ApiError | UserError):  # a fault of ours
                print(f"{id}:\n{traceback.format_exc()}", end="", file=sys.stderr, flush=True)
            failure = told(error, param)
            return _answer(id, line.custom_id, (failure.status, openai_shape(failure)), None)
        return _answer(id, line.custom_id, (200, found), None)

    def _embeddings(self, body: EmbeddingRequest) -> dict[str, Any]:
        embedder = self._models.embedder(body.model)
        return body.answer(embedder, embedder.compute(body.texts()))

    def _text(self, body: ChatRequest | CompletionRequest) -> dict[str, Any]:
        generator = self._models.generator(body.model)
        if body.streams:
            raise ApiError(400, "stream: an answer in a file has no stream", code="invalid_value", param="stream")
        with ExitStack() as stack:
            handles = [stack.enter_context(generator.submit(request)) for request in body.requests(generator)]
            try:
                results = [handle.result() for handle in handles]
            except RequestFailed as error:
                if not generator.engine.stats().healthy:
                    raise EngineClosed(f"the engine fails, and would on the requests that follow: {error}") from error
                raise
        if any(choice.finish_reason == "cancelled" for result in results for choice in result.choices):
            raise EngineClosed("the engine was closed")
        return body.answer(generator).whole(results)


def _body_of(url: str) -> type[Body]:
    if url not in _BODIES:
        message = f"url: expected one of {', '.join(_BODIES)}, found {url[:100]!r}"
        raise ApiError(404, message, code="not_found", param="url")
    return _BODIES[url]


def _validated(kind: type[M], value: Any) -> M:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        raise invalid(errors, value) from None


def _answer(
    id: str, custom_id: str | None, response: tuple[int, dict[str, Any]] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    told = None
    if response is not None:
        told = {"status_code": response[0], "request_id": f"req_{secrets.token_hex(12)}", "body": response[1]}
    return {"id": id, "custom_id": custom_id, "response": told, "error": error}
