"""``glm4export embed``: one embedding per text."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "example: glm4export embed glm-4-9b-features texts.txt -o embeddings.npy"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from glm4export.commands.text_lines import add_text_options

    add_text_options(command)
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="OUT.npy: float32 [texts, hidden]; another name: lines of JSON (default: those on standard output)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    import numpy as np

    from glm4export.commands.text_lines import counted, json_lines, new_file, open_encoder, summary, windows

    output: Path | None = arguments.output
    rows: list[np.ndarray] = []
    texts = 0
    with open_encoder(arguments) as encoder, counted() as progress:
        if output is not None and output.suffix == ".npy":
            with new_file(output) as file:
                for first, window in windows(arguments):
                    rows.append(encoder.embed(window, progress=progress, first=first))
                    texts += len(window)
                np.save(file, np.concatenate([*rows, encoder.embed([])]))
        else:
            with json_lines(output) as write:
                for first, window in windows(arguments):
                    for row in encoder.embed(window, progress=progress, first=first):
                        write({"embedding": row.tolist()})
                    texts += len(window)
    summary(arguments, texts, f"{texts} embeddings of {encoder.manifest.config['hidden_size']} numbers")
    return 0
