"""The command line's options for engines, shared by ``build`` and ``engine``. Only argparse is imported at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4runtime.contract import TENSORRT, UserError
from glm4runtime.contract.engine_spec import FLAVOURS

if TYPE_CHECKING:
    from glm4export.tensorrt.engines import Built, EngineBuilder

NO_ENGINE = "none"


def add_engine_options(command: argparse.ArgumentParser, *, may_skip: bool) -> None:
    """Add the options; with ``may_skip``, ``--engine none`` writes a bundle without one."""
    group = command.add_argument_group("engines (--target tensorrt)" if may_skip else "engines")
    group.add_argument(
        "--engine",
        choices=(*FLAVOURS, NO_ENGINE) if may_skip else tuple(FLAVOURS),
        help="flavour of TensorRT (default: what is installed)" + ("; none: the ONNX bundle alone" * may_skip),
    )
    group.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="X.Y",
        help="GPUs to build for, an engine each, such as 8.9 (default: the GPU here; tensorrt-rtx needs none here)",
    )
    group.add_argument("--prefill-chunk", type=int, metavar="N", help="most prompt tokens in a run (default: 512)")
    group.add_argument(
        "--max-batch", type=int, metavar="N", help="most sequences in a step: slots of serve and Engine (default: 1)"
    )
    group.add_argument(
        "--optimization-level", type=int, choices=range(6), metavar="0..5", help="effort (default: TensorRT's)"
    )
    group.add_argument(
        "--workspace", type=float, metavar="GB", help="GPU memory that a kernel may use as scratch (default: all)"
    )
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="keep measurements for later builds (tensorrt)"
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="an engine that later versions load, too (tensorrt); it holds code for the host that loading runs",
    )
    group.add_argument(
        "--weight-streaming",
        action="store_true",
        help="weights that don't fit the GPU stay in host memory when the engine runs",
    )
    group.add_argument(
        "--plugin-cache",
        choices=("aliased", "bound"),
        help="with --attention plugin: what TensorRT is told of the cache that is updated in place (default: aliased)",
    )


def require_flavour(arguments: argparse.Namespace) -> None:
    """Raise UserError where engines are wanted and no TensorRT is installed: before any other package is missed."""
    if arguments.target == TENSORRT and arguments.engine != NO_ENGINE:
        from glm4export.tensorrt.flavour import choose_flavour

        choose_flavour(arguments.engine)


def engine_builder(arguments: argparse.Namespace, target: str) -> EngineBuilder | None:
    """What builds the engines that were asked for; None where none is wanted. Raises UserError."""
    if target != TENSORRT:
        if given := [name for name in _ENGINE_ONLY if getattr(arguments, name)]:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --target tensorrt, not with {target}")
        return None
    if arguments.engine == NO_ENGINE:
        if given := [name for name in _ENGINE_ONLY[1:] if getattr(arguments, name)]:
            raise UserError(f"--{given[0].replace('_', '-')} does not go with --engine {NO_ENGINE}; leave one out")
        return None
    from glm4export.tensorrt.engines import EngineBuilder, EngineOptions, plan
    from glm4export.terminal.progress import engine_line

    options = EngineOptions(
        flavour=arguments.engine,
        compute_capabilities=tuple(arguments.compute_capability or ()),
        optimization_level=arguments.optimization_level,
        workspace_gb=arguments.workspace,
        timing_cache=arguments.timing_cache,
        version_compatible=arguments.version_compatible,
        weight_streaming=arguments.weight_streaming,
        **({} if arguments.plugin_cache is None else {"plugin_cache": arguments.plugin_cache}),
        **({} if arguments.prefill_chunk is None else {"prefill_chunk": arguments.prefill_chunk}),
        **({} if arguments.max_batch is None else {"max_batch": arguments.max_batch}),
    )
    return EngineBuilder(plan(options), engine_line)


_ENGINE_ONLY = (
    *("engine", "compute_capability", "prefill_chunk", "max_batch", "optimization_level", "workspace"),
    *("timing_cache", "version_compatible", "weight_streaming", "plugin_cache"),
)


def engine_facts(built: Sequence[Built]) -> list[dict[str, Any]]:
    """What was built, as JSON-ready values; sizes in bytes."""
    return [
        {
            "file": engine.spec.file,
            "version": engine.spec.version,
            "bytes": engine.spec.size,
            "attentions": engine.spec.attentions,
            "own_memory": engine.own_memory,
            "resident_memory": engine.resident_memory,
            "estimated_memory": engine.estimated_memory,
        }
        for engine in built
    ]


def engine_lines(built: Sequence[Built]) -> list[str]:
    """The same for a terminal."""
    return [
        f"  {engine.spec.file}: {engine.spec.flavour} {engine.spec.version}, {engine.spec.size / 1e6:.1f} MB, "
        f"{engine.spec.attentions} fused attentions; building took {engine.own_memory / 1e9:.2f} GB of memory"
        for engine in built
    ]
