"""One peer in one process, speaking ``peers.protocol``: what a comparison starts for each name on its command line.

    python -m peers.worker llama.cpp:Q4_0 --checkpoint DIR --work DIR --threads 2 --context 2304

Names: ``glm4export:BUNDLE``, ``llama.cpp:VARIANT``, ``openvino:VARIANT``, ``transformers:DTYPE``. Files that a peer
needs are made from the checkpoint below the work folder once. With ``--slots`` the first three answer many requests at
once (``peers.serving``), and ``glm4export-invariant:BUNDLE`` is the engine whose answers don't depend on each other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from peers.protocol import Engine, serve
from peers.serving import Server


def prepare(spec: str, arguments: argparse.Namespace) -> Callable[[], Engine]:
    """Make the files a peer needs, and return what opens it; each kind imports its own packages, and only here."""
    kind, _, variant = spec.partition(":")
    checkpoint, work = arguments.checkpoint, arguments.work
    threads, context = arguments.threads, arguments.context
    if kind == "glm4export":
        from peers.bundle import Bundle

        return lambda: Bundle(Path(variant), threads, context)
    if kind == "llama.cpp":
        from peers.llamacpp import LlamaCpp, gguf_file

        path = gguf_file(checkpoint, work, variant, threads)
        return lambda: LlamaCpp(path, threads, context, exact=variant == "F32")
    if kind == "openvino":
        from peers.openvino_int4 import OpenVino, exported

        folder = exported(checkpoint, work, variant)
        return lambda: OpenVino(folder, threads)
    if kind == "transformers":
        from peers.transformers_torch import Transformers

        return lambda: Transformers(checkpoint, variant, threads)
    raise ValueError(f"unknown peer {spec!r}; known: glm4export:, llama.cpp:, openvino:, transformers:")


def prepare_server(spec: str, arguments: argparse.Namespace) -> Callable[[], Server]:
    """The same for what answers many requests at once."""
    kind, _, variant = spec.partition(":")
    checkpoint, work = arguments.checkpoint, arguments.work
    sizes = arguments.threads, arguments.slots, arguments.context
    if kind in ("glm4export", "glm4export-invariant"):
        from peers.engine import EngineServer

        return lambda: EngineServer(Path(variant), *sizes, invariant=kind == "glm4export-invariant")
    if kind == "llama.cpp":
        from peers.llamacpp import gguf_file
        from peers.llamacpp_server import LlamaCppServer

        path = gguf_file(checkpoint, work, variant, arguments.threads)
        return lambda: LlamaCppServer(path, *sizes)
    if kind == "openvino":
        from peers.openvino_genai import OpenVinoServer
        from peers.openvino_int4 import exported

        folder = exported(checkpoint, work, variant)
        return lambda: OpenVinoServer(folder, *sizes)
    raise ValueError(f"unknown peer {spec!r}; known: glm4export:, glm4export-invariant:, llama.cpp:, openvino:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--context", type=int, default=512, help="tokens a sequence has room for (default: %(default)s)"
    )
    parser.add_argument("--slots", type=int, default=0, help="answer so many requests at once")
    parser.add_argument("--only-prepare", action="store_true", help="make the peer's files and end")
    arguments = parser.parse_args()
    makes = prepare_server if arguments.slots else prepare
    serve(lambda: makes(arguments.spec, arguments), only_prepare=arguments.only_prepare)


if __name__ == "__main__":
    main()
