"""JSON that is one line to every reader."""

from __future__ import annotations

import json
from typing import Any

#: Valid in JSON, and line breaks to some readers: Python's str.splitlines and what iterates lines by it, such as httpx
#: and requests; JavaScript before 2019.
_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def json_line(value: Any) -> str:
    """The value without a line break of any kind, and without its end. Raises ValueError for infinity and NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_BREAKS)
