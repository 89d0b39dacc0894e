"""Shared by tests: HELDOUT."""

from __future__ import annotations

from tests.helpers.demo import DEMO

HELDOUT = DEMO / "heldout.txt"
