"""Decode steps and prefill chunks over an int8 cache beside those over the default one, by length of the context.

    python tools/make_checkpoint.py out/slice --geometry glm-4-9b --layers 2
    cp glm4export/demo/tokenizer.json out/slice/
    glm4export build out/slice -o out/plain --precision int4 --target cpu --max-seq-len 8192
    glm4export build out/slice -o out/int8 --precision int4 --target cpu --max-seq-len 8192 --kv-cache int8 \\
        --calibrate glm4export/demo/heldout.txt
    python tools/bench_cache.py out/plain out/int8

Rounds of both are interleaved in one process, and medians of the rounds' ratios printed: machines are noisy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from glm4runtime import Session, load


def seconds_a_step(session: Session, context: int, steps: int) -> float:
    """Of decoding behind a context that is in the cache; it is as it was afterwards."""
    start = time.perf_counter()
    for token in range(steps):
        session.runner.decode(token)
    seconds = (time.perf_counter() - start) / steps
    session.runner.rewind(context)
    return seconds


def seconds_of_prefill(session: Session, context: int, ids: list[int]) -> float:
    """Of the context's last tokens, as many as ``ids``; they are in the cache afterwards."""
    session.runner.rewind(context - len(ids))
    start = time.perf_counter()
    session.runner.prefill(ids)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs=2, metavar="BUNDLE")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8000], help="default: 512 2048 8000")
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: onnxruntime's choice")
    arguments = parser.parse_args()

    sessions = [load(bundle, threads=arguments.threads) for bundle in arguments.bundles]
    dtypes = [session.manifest.cache.dtype for session in sessions]
    ids = np.random.default_rng(0).integers(0, sessions[0].manifest.vocab_size, max(arguments.contexts)).tolist()
    print(f"cache of {dtypes[0]}, of {dtypes[1]}, and the second's speed over the first's (rounds: lowest to highest)")
    for context in arguments.contexts:
        for session in sessions:
            session.runner.prefill(ids[session.runner.length : context])
            seconds_a_step(session, context, 2)
        last = ids[context - min(arguments.chunk, context) : context]
        rounds = [
            [
                (seconds_of_prefill(session, context, last), seconds_a_step(session, context, arguments.steps))
                for session in sessions
            ]
            for _ in range(arguments.rounds)
        ]
        for index, what in enumerate((f"prefill of the last {len(last)}", "decode step")):
            first, second = ([round_[side][index] for round_ in rounds] for side in range(2))
            ratios = [a / b for a, b in zip(first, second, strict=True)]
            print(
                f"{context:>7} tokens  {what:<24}{1e3 * statistics.median(first):9.2f} ms"
                f"{1e3 * statistics.median(second):9.2f} ms{statistics.median(ratios):7.2f}x"
                f"  ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
