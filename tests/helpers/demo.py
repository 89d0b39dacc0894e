"""Shared by tests: DEMO, PROMPTS."""

from __future__ import annotations

import json
from typing import Any

from glm4export.sources.checkpoint import locate

DEMO = locate(None).folder


PROMPTS: list[dict[str, Any]] = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))
