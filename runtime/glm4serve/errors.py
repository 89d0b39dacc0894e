"""What goes wrong, as a client is told it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm4runtime.contract import BundleError, UserError
from glm4runtime.engine import EngineClosed, PromptTooLong, QueueFull, RequestFailed

INTERNAL = "internal_error"  # the code of a fault of ours, which the log tells more of


class ApiError(Exception):
    """An error with its HTTP status. ``kind`` and ``code`` are OpenAI's; ``param`` is the field that is meant."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})


def openai_shape(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object, in answers and in streams."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def told(error: Exception, param: str | None = None) -> ApiError:
    """What a client is told of an engine's error; nothing of our folders, or of faults of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        # Anthropic's words in front: clients that shorten a conversation by themselves know it by them, OpenAI's too
        message = f"prompt is too long: {error.tokens} tokens > {error.limit} maximum ({error})"
        return ApiError(400, message, code="context_length_exceeded", param=param)
    if isinstance(error, QueueFull):
        return queue_full(str(error), error.retry_after)
    if isinstance(error, EngineClosed):
        return unavailable("the model takes no requests now: it is being closed, or has failed")
    if isinstance(error, RequestFailed):
        ours = not isinstance(error.__cause__, UserError)  # a graph's words may hold paths
        return ApiError(500, "the model failed on this request" if ours else str(error), code="request_failed")
    if isinstance(error, UserError) and not isinstance(error, BundleError):
        return ApiError(400, str(error), code="invalid_value", param=param)
    return ApiError(500, "the server failed on this request; its log says more", code=INTERNAL)


def queue_full(message: str, retry_after: float) -> ApiError:
    """429, with the seconds after which to try again."""
    headers = {"Retry-After": str(max(1, round(retry_after)))}
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)


def timed_out(message: str) -> ApiError:
    """504, and no other try: the official clients would make two more by themselves, each for as long."""
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


def unavailable(message: str) -> ApiError:
    """503."""
    return ApiError(503, message, code="service_unavailable", headers={"Retry-After": "5"})


def invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """400 out of pydantic's list of errors: each field by its path, and what was expected; nothing of the values."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"body: not valid JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    found: dict[str, list[str]] = {}
    for item in errors:
        found.setdefault(_path(item["loc"][1:], body, item["type"] == "missing"), []).append(_message(item))
    parts = [f"{path}: {', or: '.join(dict.fromkeys(messages))}" for path, messages in found.items()]
    more = f"; and {len(parts) - 5} more" if len(parts) > 5 else ""
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    code = codes.get(errors[0]["type"], "invalid_value")
    return ApiError(400, "; ".join(parts[:5]) + more, code=code, param=next(iter(found)))


def _message(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown field"
    if item["type"] == "union_tag_invalid":  # pydantic's own words name a function of ours
        return f"expected one of {item['ctx']['expected_tags']}, found {item['ctx']['tag'][:100]!r}"
    return str(item["msg"])[:300]


def _path(steps: Sequence[str | int], body: Any, missing: bool) -> str:
    """``messages[0].content``: the steps that are the body's, without those that name pydantic's alternatives."""
    path, here = "", body
    for number, step in enumerate(steps):
        if isinstance(here, list) and isinstance(step, int):
            path, here = f"{path}[{step}]", here[step]
        elif isinstance(here, dict) and (step in here or (missing and number == len(steps) - 1)):
            path, here = f"{path}.{step}" if path else str(step)[:100], here.get(step)
    return path or "body"
