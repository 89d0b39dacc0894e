"""Whether a request's answer depends on what runs beside it: random requests alone, and many at once.

Every request is answered alone first, by an engine that keeps no prefixes. Then by several clients at once, without
and with a prefix cache in which earlier requests left theirs. Tokens and log-probabilities (float64 of the logits,
with alternatives) must be the same to the bit.

    python tools/engine_exactness.py --requests 200 --clients 1 2 3 8 13
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from glm4runtime import Engine, Request, SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4-prefill-int8": {"precision": "int4", "prefill_precision": "int8"},
    "int4-int8-cache": {"precision": "int4", "kv_cache": "int8"},
}
SIZES: dict[str, Any] = {"max_seq_len": 384, "prefill_chunk": 64, "slots": 8}


def requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy and seeded, with every part of the chain now and then; half of the prompts begin like another one."""
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    made = []
    for index in range(count):
        ids = rng.integers(300, 2000, int(rng.integers(1, 200))).tolist()
        if prompts and rng.random() < 0.5:
            other = prompts[int(rng.integers(len(prompts)))]
            ids = [*other[: int(rng.integers(1, len(other) + 1))], *ids][:300]
        prompts.append(ids)
        params: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 40))}
        if rng.random() < 0.6:
            params |= {"temperature": 0.8, "seed": index}
            params |= {} if rng.random() < 0.5 else {"top_p": 0.9, "top_k": 50}
        if rng.random() < 0.2:
            params |= {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
        lookup = 7 if rng.random() < 0.15 else 0
        made.append(Request(ids, params=SamplingParams(**params), logprobs=2, lookup=lookup))
    return made


def alone(bundle: Path, made: Sequence[Request]) -> list[Any]:
    """Each one's choices, answered one after the other."""
    with Engine.load(bundle, prefix_cache="off", **SIZES) as engine:
        return [engine.generate(request).result().choices for request in made]


def at_once(bundle: Path, made: Sequence[Request], clients: int, *, hits: bool) -> tuple[list[Any], int]:
    """Each one's choices, answered for so many clients at the same time, and how many prompt tokens were cached."""
    found: list[Any] = [None] * len(made)
    turns = iter(range(len(made)))
    lock = threading.Lock()
    cache = "prompt" if hits else "off"
    with Engine.load(bundle, prefix_cache=cache, prefix_cache_bytes=1 << 28, max_queue=99, **SIZES) as engine:

        def client() -> None:
            while True:
                with lock:
                    index = next(turns, None)
                if index is None:
                    return
                found[index] = engine.generate(made[index]).result().choices

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, engine.stats().cached_tokens


def bundles(kinds: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """The embedded model, built for a CPU in each kind."""
    from glm4export.build.build import build
    from glm4export.build.options import BuildOptions
    from glm4export.sources.checkpoint import locate

    silent: Any = {"stage": lambda name: nullcontext(), "bar": lambda *size_and_name: nullcontext(lambda count: None)}
    location = locate(None)
    for kind in kinds:
        options = {**KINDS[kind], "target": "cpu"}
        if "kv_cache" in options:
            options["calibrate"] = location.folder / "heldout.txt"
        build(location, folder / kind, BuildOptions(**options), **silent)
        yield kind, folder / kind


def main() -> int:
    """Print a row per kind, clients and cache; exit status 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 3, 8, 13])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    made = requests(arguments.requests, arguments.seed)
    wrong = 0
    print(f"{'bundle':20} {'clients':>7} {'cache':>5} {'different':>9} {'cached':>7} {'seconds':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, bundle in bundles(arguments.kinds, Path(folder)):
            wanted = alone(bundle, made)
            for clients in arguments.clients:
                for hits in (False, True):
                    began = time.monotonic()
                    found, cached = at_once(bundle, made, clients, hits=hits)
                    different = sum(one != other for one, other in zip(found, wanted, strict=True))
                    wrong += different
                    seconds = time.monotonic() - began
                    print(f"{kind:20} {clients:7} {'on' if hits else 'off':>5} {different:9} {cached:7} {seconds:7.1f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
