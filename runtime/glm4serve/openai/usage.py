"""Tokens of a request in OpenAI's form."""

from __future__ import annotations

from typing import Any

from glm4runtime.engine.request import Usage


def usage_object(usage: Usage) -> dict[str, Any]:
    """cached: those whose keys and values were in the prefix cache."""
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.drafted_tokens:
        found["completion_tokens_details"] = {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
        }
    return found
