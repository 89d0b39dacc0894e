"""Load and inspect bundles whose manifest was mutated: nothing but a UserError may come of it, and at once.

python tools/attack_manifests.py glm4-demo-int8 --count 5000
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm4export.inspection import facts as inspect
from glm4runtime import UserError, load

ODD: list[Any] = [
    -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 10**8, 10**400, float("nan"), float("inf"), 1.5, "", "\0", "\x1b[2J", "\ud800",
    "../x", "/etc/passwd", "x" * 5000, "weights.bin", "decode.onnx", [], {}, [[]], None, True, False, "batch", "int8",
    "tensorrt", "cuda",
]  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(inner, (*path, key))


def mutate(manifest: Any, places: list[tuple[Any, ...]], rng: random.Random) -> str:
    """The manifest's text with one to three values dropped, doubled, renamed or replaced, now and then damaged."""
    changed = copy.deepcopy(manifest)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *parents, key = rng.choice(places)
        inner, chance = changed, rng.random()
        try:
            for parent in parents:
                inner = inner[parent]
            if chance < 0.15:
                del inner[key]
            elif chance < 0.25 and isinstance(inner, dict):
                inner[str(rng.choice(ODD))] = inner[key]
            elif chance < 0.3 and isinstance(inner, list):
                inner.append(copy.deepcopy(inner[key]))
            else:
                inner[key] = rng.choice(ODD)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    text = json.dumps(changed)
    if rng.random() < 0.05:
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(["", "\0", "{", "9" * 5000, "\\ud800"]) + text[cut + 1 :]
    return text


def main() -> int:
    """Exit status 1 where anything else than a readable UserError came, or took over a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    manifest = json.loads((arguments.bundle / "manifest.json").read_text(encoding="utf-8"))
    places, rng = list(paths(manifest)), random.Random(arguments.seed)
    counts, failures, slowest = Counter[str](), list[str](), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(shutil.copytree(arguments.bundle, Path(scratch) / "bundle"))
        actions = (lambda: load(bundle, threads=1), lambda: inspect.text(inspect.inspect_bundle(bundle)))
        for _ in range(arguments.count):
            (bundle / "manifest.json").write_text(mutate(manifest, places, rng), encoding="utf-8")
            for action in actions:
                start = time.perf_counter()
                try:
                    action()
                    counts["taken"] += 1
                except UserError as error:
                    counts["refused"] += 1
                    if not str(error).isprintable() or len(str(error)) > 500:
                        failures.append(f"unreadable: {error!r:.300}")
                except Exception:
                    failures.append(traceback.format_exc())
                slowest = max(slowest, time.perf_counter() - start)
    print(f"{dict(counts)}, {len(failures)} failures, slowest {slowest:.2f} s", *failures[:5], sep="\n")
    return int(bool(failures) or slowest > 1)


if __name__ == "__main__":
    raise SystemExit(main())
