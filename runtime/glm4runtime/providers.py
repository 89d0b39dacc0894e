"""Which code runs a bundle: the values of ``provider``. What each needs is imported when it is opened, even numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glm4runtime.contract import TENSORRT, Manifest, UserError

if TYPE_CHECKING:
    from glm4runtime.runner import Runner

ENGINE = "engine"
GRAPH_PROVIDERS = ("cpu", "cuda")  # of prefill and decode graphs
STEP_PROVIDERS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")  # of step graphs: ONNX Runtime's execution providers
PROVIDERS = (*STEP_PROVIDERS, ENGINE)


def default_provider(manifest: Manifest) -> str:
    """What a bundle runs on where nothing else is asked for: its target, and a bundle for TensorRT on its engine."""
    return ENGINE if manifest.target == TENSORRT else manifest.target


def open_runner(
    folder: Path,
    manifest: Manifest,
    *,
    provider: str | None,
    threads: int,
    max_seq_len: int | None,
    prefill_chunk: int,
    check_hashes: bool = False,
) -> Runner:
    """Open a bundle's graphs or its engine; arguments as :func:`glm4runtime.load`'s.

    Raises UserError where the provider does not fit the bundle or the machine, or sizes are out of range.
    """
    chosen = provider or default_provider(manifest)
    has_step = manifest.target == TENSORRT
    if chosen not in PROVIDERS:
        raise UserError(f"provider {chosen!r} is not known; known: {', '.join(PROVIDERS)}")
    if not has_step and chosen not in GRAPH_PROVIDERS:
        raise UserError(
            f"provider {chosen!r} runs bundles built with `--target tensorrt`; {folder} is for {manifest.target}: "
            f"use {' or '.join(GRAPH_PROVIDERS)}, or build it again"
        )
    if prefill_chunk < 1 or threads < 0:
        raise UserError(f"prefill_chunk={prefill_chunk} must be at least 1 and threads={threads} at least 0")
    if chosen == ENGINE:
        from glm4runtime.trt import open_engine

        return open_engine(
            folder, manifest, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk, check_hashes=check_hashes
        )
    from glm4runtime.ort import OrtRunner
    from glm4runtime.ort_session import require_provider
    from glm4runtime.ort_step import OrtStepRunner

    require_provider(chosen)
    runner = OrtStepRunner if has_step else OrtRunner
    return runner(
        folder, manifest, provider=chosen, threads=threads, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk
    )
