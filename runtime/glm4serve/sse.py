"""The form of server-sent events."""

from __future__ import annotations

from typing import Any

from glm4serve.lines import json_line


def event(data: Any, name: str | None = None) -> str:
    """One event, whose data is JSON, with its name where the protocol has names."""
    text = json_line(data)
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"
