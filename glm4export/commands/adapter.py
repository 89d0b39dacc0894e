"""``glm4export adapter``: a LoRA adapter as sessions of a bundle load it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLE = "example: glm4export adapter glm-4-9b-int4 my-adapter -o my-adapter.safetensors"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="built with --lora-slots")
    command.add_argument("adapter", metavar="DIR[:SCALE]", help="in peft's layout, a folder or hub id")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="what sessions load")
    command.add_argument("--token", help="hub access token (default: the stored one, or HF_TOKEN)")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.bundle.adapter import write_adapter
    from glm4export.sources.lora import open_adapter
    from glm4runtime.contract import read_manifest

    manifest = read_manifest(arguments.bundle)
    adapter = open_adapter(arguments.adapter, token=arguments.token)
    facts = write_adapter(adapter, arguments.bundle, manifest, arguments.output)
    if arguments.json:
        print(json.dumps({"file": str(arguments.output), **facts}))
    else:
        size = facts["bytes"] / 1e6
        print(f"{arguments.output}: rank {facts['rank']}, {facts['linears']} linears, {size:.1f} MB")
    return 0
