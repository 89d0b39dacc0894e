"""Time and peak memory of tracing a GLM-4-0414 geometry on the meta device, passes included; no weights exist.

    python tools/bench_trace.py --geometry glm-4-9b

The mark to keep for GLM-4-9B on two cores: under 90 s and 1 GiB for both graphs.
"""

from __future__ import annotations

import argparse
import resource
import time

from geometries import GEOMETRIES

from glm4export.build.build import compile_graph
from glm4export.build.options import BuildOptions
from glm4export.weights.fp16 import Fp16Scales
from glm4runtime.contract import graph_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="glm-4-9b", help="default: %(default)s")
    config = GEOMETRIES[parser.parse_args().geometry]
    start = time.perf_counter()
    for name in graph_names("cpu"):
        begin = time.perf_counter()
        skeleton = compile_graph(
            config,
            name,
            BuildOptions("fp16", "cpu"),
            max_seq_len=config.max_position_embeddings,
            scales=Fp16Scales(2.0**-7, 1.0),
        )
        print(f"{name:<8} {len(skeleton.graph):>5} nodes, {time.perf_counter() - begin:6.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"total    {time.perf_counter() - start:6.1f} s (mark 90), peak RSS {peak:.0f} MiB (mark 1024)")


if __name__ == "__main__":
    main()
