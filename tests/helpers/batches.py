"""Opening a bundle for many sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.providers import open_batch_runner
from glm4runtime.backends.settings import Settings
from glm4runtime.contract import read_manifest

CHUNK, SLOTS = 32, 8


def opened(bundle: Path, **options: Any) -> BatchRunner:
    """On the CPU, with runs of CHUNK tokens and SLOTS slots; options in place of these."""
    slots = options.pop("slots", SLOTS)
    given = {"provider": "cpu", "threads": 2, "max_seq_len": 231, "invariant": True, "prefill_chunk": CHUNK, **options}
    return open_batch_runner(bundle, read_manifest(bundle), Settings(**given), slots=slots)
