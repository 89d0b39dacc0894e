"""``glm4export inspect``: what a bundle holds, or what a model will take before it is built."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm4export.terminal.errors import printable_lines
from glm4runtime.contract import MANIFEST, TARGETS, UserError

EXAMPLE = "example: glm4export inspect zai-org/GLM-4-9B-0414 --json"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("what", metavar="BUNDLE|MODEL", help="bundle folder, checkpoint folder, or hub id")
    command.add_argument("--check-hashes", action="store_true", help="compare every file of a bundle with its sha256")
    command.add_argument("--target", choices=("auto", *TARGETS), default="auto", help="what a model is to be built for")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--token", help="hub access token (default: the stored one, or HF_TOKEN)")
    command.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.build.targets import detect_target
    from glm4export.inspection import facts
    from glm4export.sources.checkpoint import ADAPTER, CONFIG, locate

    folder = Path(arguments.what)
    model = any((folder / name).is_file() for name in (CONFIG, ADAPTER)) and not (folder / MANIFEST).is_file()
    model = model or not folder.exists()
    for option, given, goes in (
        ("--check-hashes", arguments.check_hashes, not model),
        ("--target", arguments.target != "auto", model),
        ("--revision", arguments.revision is not None, model),
        ("--token", arguments.token is not None, model),
    ):
        if given and not goes:
            raise UserError(f"{option} is for {'models' if goes is model else 'bundles'}, and {folder} is none")
    if model:
        location = locate(arguments.what, revision=arguments.revision, token=arguments.token, weights=False)
        target = detect_target() if arguments.target == "auto" else arguments.target
        found = facts.inspect_model(location, target)
        shown = facts.model_text(arguments.what, found)
    else:
        found = facts.inspect_bundle(folder, check_hashes=arguments.check_hashes)
        shown = facts.text(found)
    print(json.dumps(found, ensure_ascii=False) if arguments.json else printable_lines(shown))
    return 0
