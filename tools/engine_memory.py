"""What building a TensorRT-RTX engine takes beside what :mod:`glm4export.tensorrt.memory` says it will.

    python tools/engine_memory.py out/slice-fp16 out/slice-int4

For bundles built with ``--target tensorrt``. Each engine is built for compute capability 8.9 and thrown away. Prints
sizes of weights and engine, the peak of the building process's own memory, its resident peak (with the mapped weights
file), the estimate, and seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from glm4export.bundle.folder import link_bundle
from glm4export.tensorrt.engines import EngineBuilder, EngineOptions, plan
from glm4runtime.contract import WEIGHTS, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--prefill-chunk", type=int, default=512, help="default: %(default)s")
    arguments = parser.parse_args()

    options = EngineOptions("tensorrt-rtx", ("8.9",), prefill_chunk=arguments.prefill_chunk)
    print(f"{'bundle':<24}{'weights':>9}{'engine':>9}{'own':>9}{'resident':>10}{'estimate':>10}{'s':>8}   (GB)")
    for bundle in arguments.bundles:
        builder = EngineBuilder(plan(options), lambda name: nullcontext(lambda phase: None))
        with tempfile.TemporaryDirectory(dir=bundle.resolve().parent) as folder:
            link_bundle(bundle, Path(folder))
            start = time.monotonic()
            manifest = builder.add(Path(folder), read_manifest(bundle))
            seconds = time.monotonic() - start
        (built,) = builder.built
        sizes = (
            manifest.files[WEIGHTS].size,
            built.spec.size,
            built.own_memory,
            built.resident_memory,
            built.estimated_memory,
        )
        gigabytes = [size / 1e9 for size in sizes]
        print(
            f"{bundle.name:<24}{gigabytes[0]:>9.2f}{gigabytes[1]:>9.2f}{gigabytes[2]:>9.2f}{gigabytes[3]:>10.2f}"
            f"{gigabytes[4]:>10.2f}{seconds:>8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
