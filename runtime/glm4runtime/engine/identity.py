"""What cached rows depend on beside tokens, so that a saved store is only taken back where they are the same."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import Distribution, version
from pathlib import Path

from glm4runtime.backends.batch import BatchRunner


def identity_of(runner: BatchRunner) -> bytes:
    """A digest of all that rows depend on beside tokens: weights, graphs, and the kernels that computed them."""
    kernels = [platform.machine(), *_cpu_flags(), *(f"{name} {version(name)}" for name in _installed())]
    how = [runner.invariant, runner.prompt_grid, runner.prefill_chunk, *kernels]
    return hashlib.sha256("\n".join([runner.manifest.to_json(), *map(str, how)]).encode()).digest()


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("flags", "Features"))})


def _installed() -> list[str]:
    known = ("onnxruntime", "onnxruntime-gpu", "tensorrt")
    return [name for name in known if any(True for _ in Distribution.discover(name=name))]
