"""``glm4export serve``: bundles behind an HTTP API."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4export.commands.slot_options import (
    adapter_files,
    add_slot_options,
    answering_manifest,
    check_text_options,
    engine_settings,
    open_slots,
)
from glm4runtime.backends.providers import default_provider
from glm4runtime.contract import UserError, read_manifest

if TYPE_CHECKING:
    from glm4runtime.encoder import Encoder
    from glm4runtime.engine import Engine
    from glm4serve.deploy.ray import Scale

EXAMPLE = "example: glm4export serve glm-4-9b-int4 --port 8000"

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="its folder's name is the model's name")
    command.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME=BUNDLE",
        help="a bundle under another name; again for more bundles, each with slots and a cache of its own",
    )
    engine = add_slot_options(command)
    engine.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="requests that may wait (default: %(default)s); then 429"
    )
    engine.add_argument(
        "--stall-ms", type=float, default=200.0, metavar="MS", help="how long a new prompt may hold up answers"
    )
    http = command.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="default: %(default)s, which only this machine reaches")
    http.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0: a free one")
    http.add_argument("--keys", type=Path, metavar="FILE", help="API keys: a line each, KEY or NAME KEY")
    http.add_argument("--no-key", action="store_true", help="another --host for everybody who reaches it, without keys")
    http.add_argument("--cors-origin", action="append", default=[], metavar="URL", help="a site whose pages may ask")
    http.add_argument("--certificate", type=Path, metavar="FILE", help="TLS: the certificate, PEM")
    http.add_argument("--certificate-key", type=Path, metavar="FILE", help="TLS: its private key, PEM")
    http.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for a whole answer (default: %(default)s)"
    )
    http.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that answers under way have after SIGTERM (default: %(default)s)",
    )
    http.add_argument("--slots-page", action="store_true", help="GET /slots: who has slots and who waits, by key")
    http.add_argument("--no-page", action="store_true", help="no chat page at /")
    http.add_argument(
        "--otlp-endpoint",
        default=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        metavar="URL",
        help="send a span for each request to this collector, OTLP over HTTP (default: OTEL_EXPORTER_OTLP_ENDPOINT, "
        "and where that isn't set none is made)",
    )
    ray = command.add_argument_group("Ray")
    ray.add_argument("--ray", action="store_true", help="replicas under Ray Serve, on this machine or RAY_ADDRESS's")
    ray.add_argument("--replicas", type=int, metavar="N", help="default: 1; each has engines of its own")
    ray.add_argument("--min-replicas", type=int, metavar="N", help="between these two, by the length of the queue")
    ray.add_argument("--max-replicas", type=int, metavar="N")
    command.add_argument("--json", action="store_true", help="print a line of JSON with the address when it's ready")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4serve import create_app, logs, server

    bundles = _bundles(arguments)
    adapters = adapter_files(arguments, bundles)
    check_text_options(arguments, bundles)
    settings = _settings(arguments)
    names = [*bundles, *(name for files in adapters.values() for name in files)]
    if arguments.certificate is not None:
        server.check_certificate(arguments.certificate, arguments.certificate_key)

    def ready(address: str) -> None:
        if arguments.json:
            print(json.dumps({"url": address, "models": names}), flush=True)
        else:
            print(f"{', '.join(names)} at {address}/v1 (Ctrl-C ends it)", flush=True)

    scale = _scale(arguments, bundles)
    if scale is not None:
        from glm4serve.deploy import ray_cluster
        from glm4serve.deploy.ray import Served

        engine = engine_settings(arguments, max_queue=arguments.max_queue, stall_ms=arguments.stall_ms)
        for option in ("chat_template", "draft"):
            if engine[option] is not None:
                engine[option] = engine[option].resolve()
        served = Served(_resolved(bundles), engine, settings, {n: _resolved(f) for n, f in adapters.items()})
        return ray_cluster.serve(served, scale, host=arguments.host, port=arguments.port, ready=ready)
    with server.bound_socket(arguments.host, arguments.port) as bound, ExitStack() as opened:
        models: dict[str, Engine | Encoder] = {}
        for name, folder in bundles.items():
            model = models[name] = open_slots(
                folder,
                arguments,
                adapters=adapters[name],
                max_queue=arguments.max_queue,
                stall_ms=arguments.stall_ms,
            )
            opened.callback(model.close)
        logs.configure()
        return server.serve(
            create_app(models, settings),
            bound,
            drain=arguments.drain,
            certificate=arguments.certificate,
            key=arguments.certificate_key,
            ready=ready,
        )


def _resolved(paths: dict[str, Path]) -> dict[str, Path]:
    """For processes that have another working directory."""
    return {name: path.resolve() for name, path in paths.items()}


def _bundles(arguments: argparse.Namespace) -> dict[str, Path]:
    """Folders by the models' names, each looked at before any is opened."""
    named = [] if arguments.bundle is None else [(arguments.bundle.resolve().name, arguments.bundle)]
    for text in arguments.name:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise UserError(f"--name {text}: expected NAME=BUNDLE")
        named.append((name, Path(folder)))
    if not named:
        raise UserError("which bundle? give its folder, or --name NAME=BUNDLE")
    bundles = dict(named)
    if len(bundles) != len(named):
        raise UserError("two bundles have the same name; give each its own with --name NAME=BUNDLE")
    for folder in bundles.values():
        answering_manifest(folder)
    return bundles


def _settings(arguments: argparse.Namespace) -> Any:
    from glm4serve.keys import Keys
    from glm4serve.server import is_loopback
    from glm4serve.settings import Settings
    from glm4serve.tracing import check_endpoint

    if arguments.otlp_endpoint:
        check_endpoint(arguments.otlp_endpoint)
    for name in ("timeout", "drain"):
        if not 0 <= getattr(arguments, name) <= 86400:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected seconds from 0 to 86400")
    if arguments.certificate_key is not None and arguments.certificate is None:
        raise UserError("--certificate-key goes with --certificate")
    if arguments.keys is not None and arguments.no_key:
        raise UserError("--keys and --no-key exclude each other")
    local = is_loopback(arguments.host)
    if not local and arguments.keys is None and not arguments.no_key:
        raise UserError(
            f"--host {arguments.host}: others would reach it; give API keys (--keys FILE), or --no-key for everybody"
        )
    return Settings(
        keys=None if arguments.keys is None else Keys.from_file(arguments.keys),
        # Without keys, a page whose name was pointed at this machine could ask as if it were ours.
        hosts=_LOOPBACK if local and arguments.keys is None else (),
        cors_origins=tuple(arguments.cors_origin),
        request_timeout=arguments.timeout or None,
        embedding_queue=arguments.max_queue,
        slots_page=arguments.slots_page,
        page=not arguments.no_page,
        otlp_endpoint=arguments.otlp_endpoint or None,
    )


def _scale(arguments: argparse.Namespace, bundles: dict[str, Path]) -> Scale | None:
    """What --ray and its options ask for; None without it."""
    from glm4serve.deploy.ray import Scale, require_ray

    fixed, least, most = arguments.replicas, arguments.min_replicas, arguments.max_replicas
    if not arguments.ray:
        if (fixed, least, most) != (None, None, None):
            raise UserError("--replicas, --min-replicas and --max-replicas go with --ray")
        return None
    if fixed is not None and (least, most) != (None, None):
        raise UserError("--replicas and --min-replicas with --max-replicas exclude each other")
    if (least is None) != (most is None):
        raise UserError("--min-replicas and --max-replicas go together")
    if arguments.threads < 1:
        raise UserError("--ray: give each replica's --threads; Ray reserves as many CPUs for it")
    if arguments.certificate is not None or arguments.slots_page or not arguments.port:
        raise UserError("--ray goes with no --certificate (a proxy in front has it), --slots-page or --port 0")
    if isinstance(arguments.device_id, int) and arguments.device_id:
        raise UserError(
            "--ray goes with no --device-id but N,N,... for stages: Ray gives each replica GPUs, and shows it no others"
        )
    require_ray()
    if least is None or most is None:
        least = most = 1 if fixed is None else fixed
    return Scale(least, most, drain=arguments.drain, gpus=_gpus(arguments, bundles))


def _gpus(arguments: argparse.Namespace, bundles: dict[str, Path]) -> float:
    """How many GPUs each replica reserves: Ray hides all others from it, and it counts these from 0."""
    providers = {arguments.provider or default_provider(read_manifest(folder)) for folder in bundles.values()}
    if providers == {"cpu"}:
        return 0.0
    ids = arguments.device_id
    return float(1 + max(ids)) if isinstance(ids, tuple) else 1.0
