"""Errors in Anthropic's form."""

from __future__ import annotations

from typing import Any

from glm4serve.errors import ApiError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_shape(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object, in answers and in streams."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code == "unknown_parameter" and error.param == "thread":
        # There is no memory; by this Anthropic's tool runner knows that it has to send whole conversations.
        told["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": told}
