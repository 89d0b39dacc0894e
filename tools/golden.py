"""Rewrite graphs/golden: the reviewed listings of the graphs that every target and precision gets.

    python tools/golden.py

Read the diff before committing it: each change there is a change in what users run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from glm4export.build.build import compile_graph
from glm4export.build.options import CALIBRATED, BuildOptions
from glm4export.graph.listing import listing
from glm4export.graph.skeleton import Skeleton
from glm4export.passes import PIPELINES
from glm4export.sources.checkpoint import CONFIG, Checkpoint, locate
from glm4export.sources.config import read_config
from glm4export.weights.fp16 import fp16_scales
from glm4runtime.contract import graph_names

GOLDEN = Path(__file__).parent.parent / "graphs" / "golden"
_GOLDEN_SEQ_LEN = 512


def golden_skeletons() -> dict[str, Skeleton]:
    """For the embedded model, each target and precision: path below ``graphs/golden`` and graph."""
    folder = locate(None).folder
    config, checkpoint = read_config(folder / CONFIG), Checkpoint.open(folder)
    variants = {
        f"{target}-{precision}": BuildOptions(precision, target, calibrate=Path() if precision in CALIBRATED else None)
        for target, precision in PIPELINES
    }
    variants["cpu-int4-prefill-int8"] = BuildOptions("int4", "cpu", prefill_precision="int8")
    variants["cpu-fp32-cache-int8"] = BuildOptions("fp32", "cpu", kv_cache="int8", calibrate=Path("unread"))
    skeletons = {}
    for variant, options in variants.items():
        scales = fp16_scales(config, checkpoint) if options.compute_dtype == torch.float16 else None
        for name in graph_names(options.target):
            skeleton = compile_graph(config, name, options, max_seq_len=_GOLDEN_SEQ_LEN, scales=scales)
            skeletons[str(Path(variant) / f"{name}.txt")] = skeleton
    return skeletons


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, skeleton in golden_skeletons().items():
        path = GOLDEN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(listing(skeleton), encoding="utf-8")
        print(path.relative_to(GOLDEN.parent.parent))


if __name__ == "__main__":
    main()
