"""Options of the commands that answer many requests at once, and opening what answers them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4runtime.backends.settings import PROVIDERS
from glm4runtime.contract import UserError, read_manifest

if TYPE_CHECKING:
    from glm4runtime.contract import Manifest
    from glm4runtime.encoder import Encoder
    from glm4runtime.engine import Engine


def add_slot_options(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of each engine, and that the command opens sessions; returns their group."""
    command.set_defaults(opens_session=True)
    group = command.add_argument_group("each engine")
    group.add_argument("--provider", choices=PROVIDERS, help="default: the bundle's target")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="default: 0, onnxruntime chooses")
    group.add_argument("--slots", type=int, default=8, metavar="N", help="answers at once (default: %(default)s)")
    group.add_argument(
        "--max-seq-len", type=int, metavar="N", help="tokens of a prompt and its answer (default: the bundle's)"
    )
    group.add_argument(
        "--prefix-cache",
        choices=("prompt", "all", "off"),
        default="prompt",
        help="what is kept of finished requests for others that begin alike (default: %(default)s)",
    )
    group.add_argument(
        "--prefix-cache-mb", type=int, default=1024, metavar="MB", help="memory for it (default: %(default)s)"
    )
    group.add_argument(
        "--no-invariant",
        action="store_true",
        help="lone answers in int8 and int4 up to a fifth faster, but their bits then depend on what runs beside them",
    )
    group.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja file in place of the bundle's")
    return group


def answering_manifest(folder: Path) -> Manifest:
    """The bundle's. Raises UserError where it gives neither text nor embeddings of texts."""
    manifest = read_manifest(folder)
    if manifest.kv_cache is None and (manifest.encoder is None or manifest.encoder.pooling is None):
        raise UserError(
            f"{folder}: gives neither text nor one embedding per text; the latter takes a build with --pooling"
        )
    return manifest


def open_slots(folder: Path, arguments: argparse.Namespace, *, max_queue: int, stall_ms: float) -> Engine | Encoder:
    """Open a bundle as the options say; max_queue and stall_ms as :meth:`glm4runtime.Engine.load`'s."""
    from glm4runtime import load_encoder
    from glm4runtime.engine import Engine

    if read_manifest(folder).kv_cache is None:
        return load_encoder(
            folder, provider=arguments.provider, threads=arguments.threads, max_seq_len=arguments.max_seq_len
        )
    return Engine.load(folder, **engine_settings(arguments, max_queue=max_queue, stall_ms=stall_ms))


def engine_settings(arguments: argparse.Namespace, *, max_queue: int, stall_ms: float) -> dict[str, Any]:
    """Arguments of :meth:`glm4runtime.Engine.load` that the options say, and those given."""
    return {
        "slots": arguments.slots,
        "provider": arguments.provider,
        "threads": arguments.threads,
        "max_seq_len": arguments.max_seq_len,
        "invariant": not arguments.no_invariant,
        "chat_template": arguments.chat_template,
        "prefix_cache": arguments.prefix_cache,
        "prefix_cache_bytes": arguments.prefix_cache_mb << 20,
        "max_queue": max_queue,
        "stall_ms": stall_ms,
    }
