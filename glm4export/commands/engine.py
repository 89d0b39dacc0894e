"""``glm4export engine``: more TensorRT engines for a finished bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm4export.commands.engine_options import add_engine_options, engine_builder, engine_facts, engine_lines
from glm4runtime.contract import TENSORRT

EXAMPLE = "example: glm4export engine glm-4-9b-fp16 --compute-capability 8.6 8.9"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="one that was built for --target tensorrt")
    add_engine_options(command, may_skip=False)
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.tensorrt.engines import add_engines
    from glm4runtime.contract import read_manifest

    read_manifest(arguments.bundle)  # a bundle that isn't one is told before a TensorRT that isn't there
    builder = engine_builder(arguments, TENSORRT)
    assert builder is not None
    add_engines(arguments.bundle, builder)
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "engines": engine_facts(builder.built)}))
    else:
        print(f"{arguments.bundle}:", *engine_lines(builder.built), sep="\n")
    return 0
