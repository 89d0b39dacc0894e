"""Options of the commands that open a bundle, and opening it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glm4runtime.backends.settings import PROVIDERS

if TYPE_CHECKING:
    from glm4runtime.session import Session


def add_session_options(command: argparse.ArgumentParser) -> None:
    """Options of commands that open a bundle, and that they do."""
    command.set_defaults(opens_session=True)
    command.add_argument(
        "--provider",
        choices=PROVIDERS,
        help="default: the bundle's target; bundles for tensorrt run on their engine by default, and in ONNX Runtime "
        "on the other four",
    )
    add_gpu_options(command)
    add_cuda_graphs(command)
    command.add_argument("--threads", type=int, default=0, metavar="N", help="default: 0, onnxruntime chooses")
    command.add_argument("--max-seq-len", type=int, metavar="N", help="length of the cache (default: the bundle's)")
    command.add_argument(
        "--invariant",
        action="store_true",
        help="the same tokens, to the bit, with and without --lookup; int8 and int4 then decode up to a fifth slower",
    )


def add_cuda_graphs(command: argparse._ActionsContainer) -> None:
    """How a step is launched on a GPU."""
    command.add_argument(
        "--cuda-graphs", action="store_true", help="launch a step as one captured graph, for cuda (never run yet)"
    )


def add_gpu_options(command: argparse._ActionsContainer) -> None:
    """Which GPU, and how much of it."""
    command.add_argument(
        "--device-id",
        type=_devices,
        default=0,
        metavar="N",
        help="which visible GPU, for cuda and tensorrt (default: 0); N,N,... one for each stage of a bundle that was "
        "built with --stages, for cuda",
    )
    command.add_argument(
        "--gpu-mem-limit", type=float, metavar="GB", help="what may be taken of it, for cuda (default: all)"
    )


def _devices(text: str) -> int | tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on, or some with commas between")
    numbers = tuple(map(int, words))
    return numbers if len(numbers) > 1 else numbers[0]


def load_session(
    arguments: argparse.Namespace,
    *,
    check_hashes: bool = False,
    chat_template: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Session:
    """Open the bundle as the options say; arguments as :func:`glm4runtime.load`'s."""
    from glm4runtime import load

    return load(
        arguments.bundle,
        provider=arguments.provider,
        threads=arguments.threads,
        max_seq_len=arguments.max_seq_len,
        check_hashes=check_hashes,
        invariant=arguments.invariant,
        device_id=arguments.device_id,
        gpu_mem_limit=arguments.gpu_mem_limit,
        cuda_graphs=arguments.cuda_graphs,
        chat_template=chat_template,
        adapters=adapters,
    )
