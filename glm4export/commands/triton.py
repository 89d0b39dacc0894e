"""``glm4export triton``: a bundle as a model in a repository of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm4export.commands.session_options import add_gpu_options
from glm4runtime.backends.providers import GRAPH_PROVIDERS

EXAMPLE = "example: glm4export triton glm-4-9b-int4 -o models --slots 8"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="REPO", help="the repository; other models in it stay"
    )
    command.add_argument("--name", metavar="NAME", help="the model's (default: that of the bundle's folder)")
    command.add_argument(
        "--link", action="store_true", help="a symbolic link to the bundle, instead of a folder that can be moved"
    )
    command.add_argument(
        "--slots",
        type=int,
        default=8,
        metavar="N",
        help="answers at once, of a bundle without a cache rows in a run (default: %(default)s)",
    )
    engine = command.add_argument_group("language models")
    engine.add_argument("--provider", choices=GRAPH_PROVIDERS, help="default: the bundle's target")
    add_gpu_options(engine)
    engine.add_argument("--threads", type=int, metavar="N", help="default: onnxruntime chooses")
    engine.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of a prompt and its answer")
    engine.add_argument("--max-queue", type=int, metavar="N", help="requests that may wait for a slot (default: 64)")
    engine.add_argument("--prefix-cache", choices=("prompt", "all", "off"), help="default: prompt")
    engine.add_argument("--prefix-cache-mb", type=int, metavar="MB", help="memory for it (default: 1024)")
    engine.add_argument(
        "--drain",
        type=int,
        metavar="S",
        help="seconds that answers under way have when the model is unloaded or the server ends (default: 30)",
    )
    engine.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="of `glm4export adapter`, for requests that name it; may be given again",
    )
    engine.add_argument(
        "--draft", type=Path, metavar="BUNDLE", help="a smaller model with the same tokenizer, which writes ahead"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4export.bundle.triton import new_model
    from glm4export.commands.slot_options import adapter_files
    from glm4runtime.contract import UserError

    least = {"slots": 1, "threads": 0, "max_seq_len": 1, "max_queue": 0, "prefix_cache_mb": 0, "drain": 0}
    for name, number in least.items():
        value = getattr(arguments, name)
        if value is not None and value < number:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {number}")
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    if arguments.prefix_cache_mb is not None:
        settings["prefix_cache_bytes"] = arguments.prefix_cache_mb << 20
    if arguments.device_id != 0:
        settings["device_id"] = arguments.device_id
    name = arguments.bundle.resolve().name if arguments.name is None else arguments.name
    folder = new_model(
        arguments.bundle,
        arguments.output,
        name,
        settings,
        slots=arguments.slots,
        link=arguments.link,
        adapters=adapter_files(arguments, {name: arguments.bundle})[name],
        draft=arguments.draft,
    )
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "model": str(folder), "name": name}))
    else:
        print(f"{folder}: ready for `tritonserver --model-repository {arguments.output}`")
    return 0


_SETTINGS = ("provider", "gpu_mem_limit", "threads", "max_seq_len", "max_queue", "prefix_cache", "drain")
