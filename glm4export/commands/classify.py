"""``glm4export classify``: labels of texts, or of spans in them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import cast

EXAMPLE = "example: glm4export classify glm-4-9b-sentiment texts.txt -o labels.jsonl"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from glm4export.commands.text_lines import add_text_options

    add_text_options(command)
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="lines of JSON (default: standard output)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.commands.text_lines import counted, json_lines, open_encoder, summary, windows
    from glm4runtime.contract import TOKEN_CLASSIFICATION

    texts = 0
    with (
        open_encoder(arguments) as encoder,
        counted() as progress,
        json_lines(arguments.output) as write,
    ):
        spans = encoder.manifest.task == TOKEN_CLASSIFICATION
        for first, window in windows(arguments):
            if spans:
                for found in encoder.classify_tokens(cast(list[str], window), progress=progress, first=first):
                    write({"spans": [dataclasses.asdict(span) for span in found]})
            else:
                for label in encoder.classify(window, progress=progress, first=first):
                    write(dataclasses.asdict(label))
            texts += len(window)
    summary(arguments, texts, f"{texts} texts classified")
    return 0
