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
    return {"type": "error", "error": {"type": kind, "message": error.message}}
