"""The option ``--target``."""

from __future__ import annotations

TARGETS = ("auto", "cpu", "cuda", "tensorrt")
