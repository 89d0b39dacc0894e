"""Options of the commands that answer many requests at once, and opening what answers them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4export.commands.session_options import add_cuda_graphs, add_gpu_options
from glm4runtime.backends.settings import PROVIDERS
from glm4runtime.contract import AdapterFile, UserError, read_manifest

if TYPE_CHECKING:
    from glm4runtime.contract import Manifest
    from glm4runtime.encoder import Encoder
    from glm4runtime.engine import Engine


def add_slot_options(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of each engine, and that the command opens sessions; returns their group."""
    command.set_defaults(opens_session=True)
    group = command.add_argument_group("each engine")
    group.add_argument("--provider", choices=PROVIDERS, help="default: the bundle's target")
    add_gpu_options(group)
    add_cuda_graphs(group)
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
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="of `glm4export adapter`: a model of that name, for a bundle built with --lora-slots; may be given again; "
        "MODEL:NAME=FILE where several bundles are served",
    )
    group.add_argument(
        "--draft",
        type=Path,
        metavar="BUNDLE",
        help="a smaller model with the same tokenizer, which writes ahead: pays where one or two answers run at once",
    )
    return group


def answering_manifest(folder: Path) -> Manifest:
    """The bundle's. Raises UserError where it gives neither text nor embeddings of texts."""
    manifest = read_manifest(folder)
    if manifest.kv_cache is None and (manifest.encoder is None or manifest.encoder.pooling is None):
        raise UserError(
            f"{folder}: gives neither text nor one embedding per text; the latter takes a build with --pooling"
        )
    return manifest


def adapter_files(arguments: argparse.Namespace, bundles: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """Files by the adapters' names, of each of the bundles; no bundle is opened.

    Raises UserError for an option in another form, one that names no bundle that is served, and a file that is none.
    """
    found: dict[str, dict[str, Path]] = {name: {} for name in bundles}
    names = set(bundles)
    for text in arguments.adapter:
        given, sign, file = text.partition("=")
        model, _, name = given.rpartition(":")
        if not (name and sign and file):
            raise UserError(f"--adapter {text}: expected NAME=FILE, or MODEL:NAME=FILE")
        if not model and len(bundles) > 1:
            raise UserError(f"--adapter {text}: of which bundle? MODEL:NAME=FILE with one of {', '.join(bundles)}")
        model = model or next(iter(bundles))
        if model not in bundles:
            raise UserError(f"--adapter {text}: there is no bundle {model}; served: {', '.join(bundles)}")
        if name in names:
            raise UserError(f"--adapter {text}: another model is called {name}")
        if read_manifest(bundles[model]).lora is None:
            raise UserError(f"--adapter {text}: {bundles[model]} has no side paths; build it with --lora-slots N")
        AdapterFile.read(Path(file))
        names.add(name)
        found[model][name] = Path(file)
    return found


def check_text_options(arguments: argparse.Namespace, bundles: Mapping[str, Path]) -> None:
    """Raises UserError for options of engines where no bundle writes text, and a draft that is none of one bundle."""
    if all(read_manifest(folder).kv_cache is None for folder in bundles.values()):
        given = {
            "--chat-template": arguments.chat_template is not None,
            "--cuda-graphs": arguments.cuda_graphs,
            "--draft": arguments.draft is not None,
            "--no-invariant": arguments.no_invariant,
        }
        for option in (option for option, on in given.items() if on):
            raise UserError(f"{option}: for bundles that write text, which {', '.join(bundles)} doesn't")
    if arguments.draft is not None:
        if len(bundles) > 1:
            raise UserError(f"--draft {arguments.draft}: goes with one bundle, and {len(bundles)} are served")
        read_manifest(arguments.draft)


def open_slots(
    folder: Path, arguments: argparse.Namespace, *, adapters: Mapping[str, Path], max_queue: int, stall_ms: float
) -> Engine | Encoder:
    """Open a bundle as the options say. adapters: one of :func:`adapter_files`'; the others as Engine.load's."""
    from glm4runtime import load_encoder
    from glm4runtime.engine import Engine

    if read_manifest(folder).kv_cache is None:
        return load_encoder(
            folder,
            provider=arguments.provider,
            threads=arguments.threads,
            max_seq_len=arguments.max_seq_len,
            device_id=arguments.device_id,
            gpu_mem_limit=arguments.gpu_mem_limit,
        )
    settings = engine_settings(arguments, max_queue=max_queue, stall_ms=stall_ms)
    return Engine.load(folder, adapters=adapters, **settings)


def engine_settings(arguments: argparse.Namespace, *, max_queue: int, stall_ms: float) -> dict[str, Any]:
    """Arguments of :meth:`glm4runtime.Engine.load` that the options say, and those given."""
    return {
        "slots": arguments.slots,
        "provider": arguments.provider,
        "threads": arguments.threads,
        "max_seq_len": arguments.max_seq_len,
        "device_id": arguments.device_id,
        "gpu_mem_limit": arguments.gpu_mem_limit,
        "cuda_graphs": arguments.cuda_graphs,
        "invariant": not arguments.no_invariant,
        "chat_template": arguments.chat_template,
        "prefix_cache": arguments.prefix_cache,
        "prefix_cache_bytes": arguments.prefix_cache_mb << 20,
        "max_queue": max_queue,
        "stall_ms": stall_ms,
        "draft": arguments.draft,
    }
