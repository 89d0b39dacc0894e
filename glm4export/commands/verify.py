"""``glm4export verify``: a bundle beside PyTorch in fp32."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm4export.commands.session_options import add_session_options, load_session
from glm4runtime.contract import UserError

EXAMPLE = "example: glm4export verify glm-4-9b-fp16 --checkpoint ./GLM-4-9B-0414"

_STEPS = 32  # of each prompt, where --steps doesn't say


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument(
        "--checkpoint", metavar="MODEL", help="what it was built from; needed where that was a local folder"
    )
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="a LoRA adapter it was built with; needed where that was a local folder, in the order of the build",
    )
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="instead of the built-in ones")
    command.add_argument("--steps", type=int, metavar="N", help=f"decode steps per prompt (default: {_STEPS})")
    command.add_argument(
        "--long",
        action="store_true",
        help="also fill the cache to its last row, where rotary tables and YaRN may be wrong: minutes to hours, since "
        "PyTorch computes as many tokens in fp32 (--max-seq-len makes them fewer)",
    )
    command.add_argument(
        "--max-kl", type=float, metavar="NATS", help="mean KL divergence allowed in a phase (default: by precision)"
    )
    command.add_argument(
        "--min-top1", type=float, metavar="SHARE", help="top-1 agreement asked over all (default: by precision)"
    )
    add_session_options(command)
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.verification import verify
    from glm4runtime.contract import read_manifest

    if read_manifest(arguments.bundle).encoder is not None:
        return _verify_encoder(arguments)
    with load_session(arguments, check_hashes=True) as session:
        default = verify.thresholds_of(session.manifest)
        thresholds = verify.Thresholds(
            mean_kl=default.mean_kl if arguments.max_kl is None else arguments.max_kl,
            top1=default.top1 if arguments.min_top1 is None else arguments.min_top1,
        )
        report = verify.verify(
            session,
            checkpoint=arguments.checkpoint,
            adapters=arguments.lora,
            prompts=arguments.prompt,
            steps=_STEPS if arguments.steps is None else arguments.steps,
            long=arguments.long,
            thresholds=thresholds,
        )
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else verify.table(report))
    return 1 if report.failures else 0


def _verify_encoder(arguments: argparse.Namespace) -> int:
    """The same for a bundle without a cache."""
    from glm4export.verification import encoders
    from glm4runtime import load_encoder

    for option, given in (
        ("--long", arguments.long),
        ("--invariant", arguments.invariant),
        ("--steps", arguments.steps is not None),
    ):
        if given:
            raise UserError(f"{option} goes with bundles that generate text; leave it out")
    with load_encoder(
        arguments.bundle,
        provider=arguments.provider,
        threads=arguments.threads,
        max_seq_len=arguments.max_seq_len,
        truncate=True,
        check_hashes=True,
        device_id=arguments.device_id,
        gpu_mem_limit=arguments.gpu_mem_limit,
    ) as encoder:
        report = encoders.verify_encoder(
            encoder,
            checkpoint=arguments.checkpoint,
            adapters=arguments.lora,
            prompts=arguments.prompt,
            max_kl=arguments.max_kl,
            min_top1=arguments.min_top1,
        )
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else encoders.table(report))
    return 1 if report.failures else 0
