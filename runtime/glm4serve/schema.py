"""Bodies of requests: read once, strictly, and unknown fields refused. No framework: batches are read so too."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json


class Strict(BaseModel):
    """A JSON object with these fields and no others; no value is converted into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


def read_json(data: bytes) -> Any:
    """What it holds. Unlike Python's reader, this one has a limit of depth (200), and refuses NaN and lone surrogates.

    Raises ValueError for what is no JSON.
    """
    return from_json(data, allow_inf_nan=False)
