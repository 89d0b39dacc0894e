"""This machine's limits: read bandwidth and matmul peaks, to compare figures with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from glm4export.machine import cores
from glm4runtime.backends.memory import memory_bytes

_SECONDS = 1.0  # spent on each measured limit, at least
_ARRAY_BYTES = 1 << 29  # read for the bandwidth, unless memory is short
_BLOCK = 128  # weights that share a scale
_MATMUL = (512, 2048, 2048)  # M, K, N of the peak: a prefill chunk against a weight that is too large for L2


@dataclass(frozen=True)
class Limits:
    """The most that this machine was seen to do with all cores."""

    read_bytes_per_second: float
    int8_ops_per_second: float  # a multiplication and an addition are two
    fp32_ops_per_second: float

    def ops_per_second(self, kind: str) -> float:
        """The peak of ``int8`` or ``fp32``."""
        return self.int8_ops_per_second if kind == "int8" else self.fp32_ops_per_second


def measure_limits() -> Limits:
    """Read bandwidth and matmul peaks, a few seconds in all. Needs onnxruntime and up to 1.5 GB of memory."""
    return Limits(read_bandwidth(), matmul_peak("int8"), matmul_peak("fp32"))


def read_bandwidth() -> float:
    """Bytes a second read from memory by all cores together, the best of several passes over a large array.

    Each core takes the maximum of its own part, which numpy does with vector instructions and without the interpreter's
    lock; numpy asks for huge pages, so that the figure is the memory's and not the page tables'.
    """
    size = min(_ARRAY_BYTES, memory_bytes()[1] // 4)
    size = max(size, 1 << 20)
    workers = cores()
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda _: np.ones(size // workers // 4, np.int32), range(workers)))
        seconds = _best(lambda: list(pool.map(np.max, parts)))
    return sum(part.nbytes for part in parts) / seconds


def matmul_peak(kind: str) -> float:
    """Operations a second of one of onnxruntime's matmuls, on all cores.

    kind: ``int8`` (unsigned by signed, exact sums), ``int4`` (weights in blocks of 128, activations in int8), ``fp32``.
    """
    import onnxruntime as ort

    from glm4runtime.backends.matmul_model import int4_model, matmul_model

    rows, depth, columns = _MATMUL
    if kind == "int4":
        packed = np.full((columns, depth // _BLOCK, _BLOCK // 2), 0x99, np.uint8)
        model = int4_model(packed, np.ones(columns * depth // _BLOCK, np.float32))
    else:
        model = matmul_model(np.ones((depth, columns), np.int8 if kind == "int8" else np.float32))
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {"A": np.ones((rows, depth), np.uint8 if kind == "int8" else np.float32)}
    return 2 * rows * depth * columns / _best(lambda: session.run(None, feeds))


def _best(run: Callable[[], object]) -> float:
    """The shortest of several runs in seconds, after one to warm up."""
    run()
    best, end = math.inf, time.perf_counter() + _SECONDS
    while best is math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
