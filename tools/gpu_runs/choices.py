"""What is left to choose by measuring: top logits, and int4 in the fused kernels: for ``gpu_check.py``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm4export import cli
from glm4export.verification.verify import verify
from glm4runtime import SamplingParams, Session, load
from gpu_runs.bundles import DECODED, MAX_SEQ_LEN, Result, greedy

TOP = 64
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "top-p": {"temperature": 0.7, "top_p": 0.8},
}
_FUSED = "ORT_FPA_INTB_GEMM"  # onnxruntime's switch of the fused kernels; matmul_nbits.h reads it as a graph is opened


def build(model: str | None, bundle: Path, *options: str) -> Result | None:
    """Build for cuda; returns what went wrong."""
    command = ["build", *([model] if model else []), "-o", str(bundle), "--target", "cuda", *options]
    status = cli.main([*command, "--max-seq-len", str(MAX_SEQ_LEN)])
    return {"ok": False, "error": f"glm4export build ended with status {status}"} if status else None


def top_logits(model: str | None, folder: Path, provider: str) -> Iterator[Result]:
    """Tokens chosen among a row's most probable ones: the same as of whole rows, and a second's beside theirs."""
    bundle, name, count = folder / "cuda-fp16-top", f"top {TOP} logits", DECODED if provider == "cuda" else 16
    if wrong := build(model, bundle, "--precision", "fp16", "--output-top-logits", str(TOP)):
        yield {"case": name, **wrong}
        return
    for graphs in (False, True) if provider == "cuda" else (False,):
        with load(bundle, provider=provider, cuda_graphs=graphs) as session:  # type: ignore[arg-type]
            for kind, sampling in SAMPLINGS.items():
                params = SamplingParams(max_new_tokens=count, seed=1, **sampling)
                for lookup in (0, 4):
                    held, speed = generated(session, params, lookup)
                    named, session.runner.top_count = session.runner.top_count, 0
                    whole, rows_speed = generated(session, params, lookup)
                    session.runner.top_count = named
                    case = f"{name}, {kind}, lookup {lookup}{', CUDA graphs' if graphs else ''}"
                    rates = {"tokens_per_second": speed, "of_whole_rows": speed / rows_speed}
                    yield {"case": case, "ok": held == whole, **rates}


def generated(session: Session, params: SamplingParams, lookup: int) -> tuple[list[int], float]:
    """Tokens behind a prompt that repeats itself, and how many a second; the second time."""
    for _ in range(2):
        answer = session.generate(list(range(300, 332)) * 4, params, lookup=lookup, stop=())
        start = time.perf_counter()
        tokens = list(answer)
        seconds = time.perf_counter() - start
    return tokens, len(tokens) / seconds


def fused_int4(model: str | None, folder: Path) -> Iterator[Result]:
    """int4 in blocks of 32, which onnxruntime's fused kernels take where they're switched on, beside its others."""
    bundle, name = folder / "cuda-int4-32", "int4 in blocks of 32"
    if wrong := build(model, bundle, "--precision", "int4", "--block-size", "32"):
        yield {"case": name, **wrong}
        return
    for switch in ("0", "1"):
        with switched(switch):
            start = time.perf_counter()
            with load(bundle, provider="cuda") as session:
                opened = time.perf_counter() - start
                found = verify(session, checkpoint=model)
                _, speed = greedy(session, DECODED)
        worst = max(phase.mean_kl for phase in found.phases)
        case = f"{name}, {_FUSED}={switch}"
        rates = {"tokens_per_second": speed, "seconds_to_open": opened}
        yield {"case": case, "ok": not found.failures, "mean_kl": worst, **rates}


@contextmanager
def switched(value: str) -> Iterator[None]:
    before = os.environ.get(_FUSED)
    os.environ[_FUSED] = value
    try:
        yield
    finally:
        del os.environ[_FUSED]
        if before is not None:
            os.environ[_FUSED] = before
