"""Microseconds of CPU that choosing one token takes, at GLM-4's vocabulary: the fastest and the median of many rows.

python tools/bench_sampling.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glm4runtime import SamplingParams
from glm4runtime.backends.held_row import HeldRow
from glm4runtime.sampling import Sampler
from glm4runtime.sampling.logprobs import log_probabilities

VOCAB = 151552
HISTORY = 2000  # tokens of prompt and answer, a half each
ROWS = 40
TOP = 64  # tokens that a held row names
KINDS = ("peaked", "flat", "tied", "equal")
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}
EVERYTHING = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.95,
    "xtc_probability": 0.5,
    **PENALTIES,
    "dry_multiplier": 0.8,
    "no_repeat_ngram_size": 4,
    "logit_bias": {5: 1.0},
    "banned_tokens": [6],
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 40": {"temperature": 0.8, "top_k": 40},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 40, top_p 0.95": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "typical_p 0.95": {"temperature": 0.8, "typical_p": 0.95},
    "top_p 0.95, typical_p 0.95": {"temperature": 0.8, "top_p": 0.95, "typical_p": 0.95},
    "xtc": {"temperature": 0.8, "xtc_probability": 0.5},
    f"penalties over {HISTORY}": PENALTIES,
    f"dry over {HISTORY}": {"dry_multiplier": 0.8},
    f"no_repeat_ngram over {HISTORY}": {"no_repeat_ngram_size": 4},
    "everything": EVERYTHING,
}


def rows_like(kind: str) -> np.ndarray:
    """Logits, float32 [ROWS, VOCAB]: a few likely tokens over a tail, as a trained model's; all much alike; in steps of
    1/8, so that thousands tie; or all equal."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((ROWS, VOCAB), np.float32)
    if kind == "peaked":
        logits *= 2
        for row in logits:
            row[random.integers(0, VOCAB, 40)] = np.linspace(22, 10, 40)
    return {"peaked": logits, "flat": logits * 0.3, "tied": np.round(logits * 4) / 8, "equal": logits * 0}[kind]


def held(row: np.ndarray) -> HeldRow:
    """A row as a bundle built with ``--output-top-logits`` gives it."""
    ids = np.argsort(-row, kind="stable")[:TOP]
    return HeldRow(row[ids], ids, float(np.log(np.exp(row.astype(np.float64)).sum())), lambda: row)


def times(step: Callable[[Any], object], rows: Sequence[Any] | np.ndarray) -> str:
    """Of one call for each row, after one to warm up."""
    step(rows[0])
    seconds = []
    for row in rows:
        start = time.thread_time()
        step(row)
        seconds.append(time.thread_time() - start)
    return f"{min(seconds) * 1e6:.0f} / {statistics.median(seconds) * 1e6:.0f}"


def main() -> None:
    """Print the table."""
    text = np.random.default_rng(1).integers(0, 500, HISTORY)
    mask = np.random.default_rng(2).integers(0, 2**32, VOCAB // 32, np.uint32)
    print(f"{'us a row, fastest / median':32}" + "".join(f"{kind:>16}" for kind in KINDS))
    results: dict[str, list[str]] = {}
    for kind in KINDS:
        rows = rows_like(kind)
        for name, fields in CASES.items():
            params = SamplingParams(seed=0, max_new_tokens=HISTORY, **fields)
            sampler = Sampler(params, VOCAB, prompt=text[: HISTORY // 2])
            for token in text[HISTORY // 2 :].tolist():
                sampler.record(token)
            results.setdefault(name, []).append(times(sampler, rows))
            if sampler.chooses_among(TOP):
                results.setdefault(f"{name}, held", []).append(times(sampler, [held(row) for row in rows]))
            if name in ("greedy", "everything"):
                masked = times(lambda row, sampler=sampler: sampler(row, mask), rows)
                results.setdefault(f"{name}, mask", []).append(masked)
        found = times(lambda row: log_probabilities(row[None], [5], 20), rows)
        results.setdefault("log-probabilities, top 20", []).append(found)
    for name, cells in results.items():
        print(f"{name:32}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
