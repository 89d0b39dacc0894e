"""``glm4export prepare``: a bundle's weights as this machine's kernels want them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLE = "example: glm4export prepare glm-4-9b-int4"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4runtime.backends.prepare import prepare
    from glm4runtime.contract import read_manifest

    prepared = prepare(arguments.bundle, read_manifest(arguments.bundle))
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "prepared": str(prepared)}))
    else:
        print(f"{prepared}: ready for this machine")
    return 0
