"""Decode steps of our loop beside onnxruntime-genai's on the same graph, and the loop's overhead outside ONNX Runtime.

    python tools/make_checkpoint.py out/slice --geometry glm-4-9b --layers 2
    glm4export build out/slice -o out/slice-fp32 --precision fp32 --max-seq-len 2048
    python tools/bench_decode.py out/slice-fp32

Rounds of both are interleaved in one process, and medians of the rounds' ratios printed: machines are noisy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime import SamplingParams, Session, load

PROMPT = list(range(100, 164))


class TimedSession:
    """Counts the seconds spent inside the session it stands for."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.seconds = 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - start


def our_round(session: Session, timed: TimedSession, steps: int) -> tuple[float, float]:
    """Seconds per step, and the share of it spent outside ONNX Runtime: sampling, binding, Python."""
    generation = session.generate(PROMPT, SamplingParams(max_new_tokens=steps + 1))
    next(generation)
    timed.seconds = 0.0
    start = time.perf_counter()
    count = sum(1 for _ in generation)
    total = time.perf_counter() - start
    return total / count, 1 - timed.seconds / total


def genai_rounds(bundle: Path, steps: int, threads: int) -> Callable[[], float]:
    """A function that times one round of onnxruntime-genai, in seconds per step."""
    import onnxruntime_genai as og

    config = og.Config(str(bundle))
    if threads:
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = og.Model(config)

    def run() -> float:
        params = og.GeneratorParams(model)
        length = len(PROMPT) + steps + 1
        params.set_search_options(max_length=length, min_length=length)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(PROMPT, np.int32))
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return (time.perf_counter() - start) / steps

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=24, help="decode steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: onnxruntime's choice")
    arguments = parser.parse_args()

    session = load(arguments.bundle, threads=arguments.threads)
    timed = TimedSession(session.runner._decode)
    session.runner._decode = timed
    genai = genai_rounds(arguments.bundle, arguments.steps, arguments.threads)
    genai()
    our_round(session, timed, arguments.steps)
    ours, theirs, overheads = [], [], []
    for _ in range(arguments.rounds):
        seconds, overhead = our_round(session, timed, arguments.steps)
        ours.append(seconds)
        overheads.append(overhead)
        theirs.append(genai())
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    print(f"glm4export          {1e3 * statistics.median(ours):8.2f} ms/step")
    print(f"onnxruntime-genai   {1e3 * statistics.median(theirs):8.2f} ms/step")
    print(f"speed, ours/genai   {statistics.median(ratios):8.3f}   (rounds {min(ratios):.3f} to {max(ratios):.3f})")
    print(f"outside the session {100 * statistics.median(overheads):8.2f} % of a step (mark: 5)")


if __name__ == "__main__":
    main()
