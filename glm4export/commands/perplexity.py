"""``glm4export perplexity``: how well a bundle predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from glm4export.commands.session_options import add_session_options, load_session
from glm4runtime.contract import UserError

EXAMPLE = "example: glm4export perplexity glm-4-9b-int4 --text wiki.test.txt --prefix '[gMASK]<sop>'"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("--text", type=Path, metavar="FILE", required=True, help="what is scored, in UTF-8")
    command.add_argument("--prefix", metavar="TEXT", default="", help="in front of every window, not scored")
    command.add_argument("--window", type=int, metavar="N", help="tokens at a time (default: 2048, or the cache's)")
    command.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window to the next (default: half a window)"
    )
    add_session_options(command)
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.evaluation.perplexity import perplexity

    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{arguments.text}: cannot be read as text ({error})") from None
    with load_session(arguments) as session:
        found = perplexity(session, text, window=arguments.window, stride=arguments.stride, prefix=arguments.prefix)
    if arguments.json:
        figures = {"perplexity": found.perplexity, "nats_per_token": found.nats_per_token}
        print(json.dumps({**figures, "bits_per_byte": found.bits_per_byte, **dataclasses.asdict(found)}))
        return 0
    print(f"perplexity      {found.perplexity:.4f}")
    print(f"nats per token  {found.nats_per_token:.5f}")
    print(f"bits per byte   {found.bits_per_byte:.5f}")
    print(
        f"scored          {found.tokens} tokens, {found.bytes} bytes; windows of {found.window}, {found.stride} apart"
    )
    return 0
