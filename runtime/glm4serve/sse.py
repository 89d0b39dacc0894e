"""The form of server-sent events."""

from __future__ import annotations

import json
from typing import Any


def event(data: Any, name: str | None = None) -> str:
    """One event, whose data is JSON, with its name where the protocol has names."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"
