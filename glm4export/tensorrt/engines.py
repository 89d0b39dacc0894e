"""Engines of a bundle: planned, checked against memory and disk, built one after another in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm4export.bundle.folder import changed_bundle, require_space
from glm4export.tensorrt.flavour import Flavour, choose_flavour
from glm4export.tensorrt.memory import Weights, require_memory, stored_weights
from glm4export.tensorrt.worker import ALIASED, Job
from glm4runtime import signals
from glm4runtime.backends.gpu import gpu_capability
from glm4runtime.backends.settings import MOST_SLOTS
from glm4runtime.contract import (
    MANIFEST,
    TENSORRT,
    WEIGHTS,
    BundleError,
    FileSpec,
    Manifest,
    UserError,
    read_manifest,
    sha256_of,
)
from glm4runtime.contract.engine_spec import FOLDER, FULL, PLUGIN, STANDARD, EngineSpec, engine_stem
from glm4runtime.contract.onnxfile import read_graph

Phase = Callable[[str], None]  # told what is being done
Show = Callable[[str], AbstractContextManager[Phase]]  # a progress display for the engine of a name

_ENGINE_OVERHEAD = 1.05  # of an engine over its weights; the kernels in it are a few megabytes
_KERNEL_BYTES = 32_000_000


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built. ``compute_capabilities`` empty means the GPU of this machine; None, TensorRT's default."""

    flavour: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    prefill_chunk: int = 512  # tokens; the runtime's default. Without a cache: the longest text
    optimization_level: int | None = None  # 0 to 5
    workspace_gb: float | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    weight_streaming: bool = False
    plugin_cache: str = ALIASED  # or "bound", with --attention plugin
    max_batch: int = 1  # sequences of a step: slots of an Engine

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1:
            raise UserError(f"--prefill-chunk {self.prefill_chunk}: expected at least 1")
        if not 1 <= self.max_batch <= MOST_SLOTS:
            raise UserError(f"--max-batch {self.max_batch}: expected 1 to {MOST_SLOTS} sequences")
        if self.workspace_gb is not None and not self.workspace_gb > 0:
            raise UserError(f"--workspace {self.workspace_gb:g}: expected more than 0 GB")


@dataclass(frozen=True)
class Plan:
    """A checked wish: a flavour that is installed, and capabilities that it builds for here."""

    flavour: Flavour
    compute_capabilities: tuple[str, ...]
    options: EngineOptions


@dataclass(frozen=True)
class Built:
    """An engine and what building it took: bytes of the process's own memory, with mapped files, and as estimated."""

    spec: EngineSpec
    own_memory: int
    resident_memory: int
    estimated_memory: int


def plan(options: EngineOptions) -> Plan:
    """Choose flavour and capabilities. Raises UserError for what can't be built here, naming what can."""
    flavour = choose_flavour(options.flavour)
    module = flavour.load()
    for option, wanted, able in (
        ("--version-compatible", options.version_compatible, flavour.version_compatible),
        ("--timing-cache", options.timing_cache is not None, flavour.times_kernels),
    ):
        if wanted and not able:
            raise UserError(f"{option} is not something that {flavour.name} has; leave it out")
    wanted_capabilities = tuple(dict.fromkeys(options.compute_capabilities))
    if flavour.cross_compiles:
        known = ", ".join(flavour.capabilities(module))
        if not wanted_capabilities:
            here = gpu_capability()
            if here is None:
                raise UserError(
                    "no GPU here to build an engine for: name the GPU's compute capability with --compute-capability "
                    f"(one or more of {known}; 8.6 is RTX 30, 8.9 RTX 40 and L4, 12.0 RTX 50), "
                    "or write the bundle without an engine with --engine none"
                )
            wanted_capabilities = (here,)
        for capability in wanted_capabilities:
            if capability not in flavour.capabilities(module):
                raise UserError(f"--compute-capability {capability}: {flavour.name} builds for {known}")
    else:
        here = gpu_capability()
        if here is None:
            raise UserError(f"{flavour.name} builds for the GPU at hand, and there is none; see --engine tensorrt-rtx")
        if set(wanted_capabilities) - {here}:
            raise UserError(
                f"--compute-capability {' '.join(wanted_capabilities)}: {flavour.name} builds for the GPU at hand, "
                f"which is {here}; build there, or see --engine tensorrt-rtx"
            )
        wanted_capabilities = (here,)
    return Plan(flavour, wanted_capabilities, options)


class EngineBuilder:
    """Builds a plan's engines into a folder that is to become a bundle. ``built`` are those that are done."""

    def __init__(self, plan: Plan, show: Show) -> None:
        self.plan, self.built = plan, list[Built]()
        self._show = show

    def check(self, folder: Path, weights: Weights, attention: str) -> None:
        """Raise UserError where memory, or the disk under ``folder``, has no room for engines of these weights.

        And where the flavour has no plugins, and ``attention`` is one.
        """
        if attention == PLUGIN and not self.plan.flavour.takes_plugins:
            raise UserError(
                f"--attention plugin: {self.plan.flavour.name} takes no plugins; build its engines with "
                "--attention standard, or with full TensorRT on the machine with the GPU (--engine tensorrt)"
            )
        if attention != PLUGIN and self.plan.options.plugin_cache != ALIASED:
            raise UserError("--plugin-cache goes with --attention plugin, which this graph hasn't got; leave it out")
        if attention == FULL and self.plan.options.max_batch > 1:
            raise UserError(
                "--max-batch is for graphs with a cache; engines of others take several texts anyway: leave it out"
            )
        require_memory(weights)
        size = sum(nbytes for _, nbytes in weights.values()) * _ENGINE_OVERHEAD + _KERNEL_BYTES
        require_space(folder, len(self.plan.compute_capabilities) * int(size))

    def add(self, folder: Path, manifest: Manifest) -> Manifest:
        """Build engines and sidecars beside ``manifest``'s graph and weights; returns it with the new files."""
        (folder / FOLDER).mkdir(exist_ok=True)
        files = dict(manifest.files)
        for capability in self.plan.compute_capabilities:
            engine = _build_engine(folder, manifest, self.plan, capability, self._show)
            self.built.append(engine)
            sidecar = f"{engine_stem(engine.spec.flavour, capability)}.json"
            files[engine.spec.file] = FileSpec(engine.spec.size, engine.spec.sha256)
            files[sidecar] = FileSpec((folder / sidecar).stat().st_size, sha256_of(folder / sidecar))
        return replace(manifest, files=files)


def add_engines(bundle: Path, builder: EngineBuilder) -> Manifest:
    """Build engines for a finished bundle; it takes them in one step, and is left alone when anything fails.

    What else lies in its folder stays there.
    """
    manifest = read_manifest(bundle)
    if manifest.target != TENSORRT:
        raise BundleError(f"{bundle}: built for {manifest.target}; engines are made of bundles for --target tensorrt")
    cache = builder.plan.options.timing_cache
    with changed_bundle(bundle, [] if cache is None else [cache]) as folder:
        graph = bundle / manifest.engine_graph.file
        builder.check(folder, stored_weights(graph), attention_of(graph))
        extended = builder.add(folder, manifest)
        (folder / MANIFEST).unlink()  # a link: writing into it would change the bundle's own
        (folder / MANIFEST).write_text(extended.to_json(), encoding="utf-8")
    return extended


def attention_of(graph: Path) -> str:
    """How a graph has its attention: STANDARD, PLUGIN or FULL. Raises BundleError where it can't be read."""
    read = read_graph(graph)
    if not any(spec.name.startswith("past_key_values.") for spec in read.inputs):
        return FULL
    return PLUGIN if any(node.domain for node in read.nodes) else STANDARD


def _build_engine(folder: Path, manifest: Manifest, plan: Plan, capability: str, show: Show) -> Built:
    options, flavour = plan.options, plan.flavour
    graph = folder / manifest.engine_graph.file
    estimated = require_memory(stored_weights(graph))  # again: other programs may have taken some since
    attention = attention_of(graph)
    chunk = min(options.prefill_chunk, manifest.max_seq_len)
    profiles = flavour.text_profiles(chunk) if attention == FULL else flavour.profiles(chunk, options.max_batch)
    stem = engine_stem(flavour.name, capability)
    for suffix in (".engine", ".json"):  # an earlier engine's name is a link to the bundle's own file
        (folder / f"{stem}{suffix}").unlink(missing_ok=True)
    job = Job(
        flavour=flavour.name,
        compute_capability=capability,
        graph=str(graph.absolute()),
        engine=str((folder / f"{stem}.engine").absolute()),
        attention=attention,
        layers=manifest.config["num_hidden_layers"],
        profiles=profiles,
        optimization_level=options.optimization_level,
        workspace=None if options.workspace_gb is None else int(options.workspace_gb * 1e9),
        timing_cache=None if options.timing_cache is None else str(options.timing_cache.absolute()),
        version_compatible=options.version_compatible,
        weight_streaming=options.weight_streaming,
        plugin_cache=options.plugin_cache,
    )
    with show(Path(stem).name) as phase:
        facts = run(job, phase)
    memory = facts.pop("memory")
    spec = EngineSpec(
        flavour=flavour.name,
        compute_capability=capability,
        precision=manifest.precision,
        attention=attention,
        version_compatible=options.version_compatible,
        weight_streaming=options.weight_streaming,
        profiles=profiles,
        graph_sha256=manifest.engine_graph_sha256,
        weights_sha256=manifest.files[WEIGHTS].sha256,
        **facts,
    )
    (folder / f"{stem}.json").write_text(spec.to_json(), encoding="utf-8")
    return Built(spec, memory["own"], memory["resident"], estimated)


def run(job: Job, phase: Phase) -> dict[str, Any]:
    """Run a job in a process of its own and wait. Raises UserError with its reason, or OSError where the disk fails.

    Whatever interrupts the wait ends the process at once.
    """
    with _process(job) as (events, process, output):
        for line in events:
            event = json.loads(line)
            if "doing" in event:
                phase(f"{event['doing']}, {event['own'] / 1e9:.1f} GB of memory")
            elif "done" in event:
                done: dict[str, Any] = event["done"]
                return done
            elif "errno" in event:
                raise OSError(event["errno"], event["error"])
            elif "error" in event:
                raise UserError(event["error"])
        status = process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace").strip().splitlines()
    raise UserError(_died(job, status, said))


def _died(job: Job, status: int, said: list[str]) -> str:
    if status == -9:
        return (
            f"{job.flavour}: the building process was killed, as the kernel does when memory runs out; "
            "build on a machine with more memory, or choose --precision int8 or int4"
        )
    last = f"; its last words: {said[-1]}" if said else ""
    return f"{job.flavour}: the building process ended with status {status}{last}"


@contextmanager
def _process(job: Job) -> Iterator[tuple[Any, subprocess.Popen[bytes], Any]]:
    """The worker, its events and its output; it never outlives the block."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reader) as events, ExitStack() as stack:
        with signals.held():
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "glm4export.tensorrt.worker", str(writer)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=(writer,),
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path)},
                    cwd="/",  # python -m looks for modules in the working directory first
                    start_new_session=True,  # Ctrl-C is for this process, which ends the other
                )
            finally:
                os.close(writer)
            stack.enter_context(signals.undone(lambda: _kill(process.pid)))
        try:
            assert process.stdin is not None
            try:
                process.stdin.write(job.to_json().encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it died at once; what it said is told
            yield events, process, output
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _kill(process_id: int) -> None:
    """End the worker before its folder is removed; by its id, since a wait under way holds the Popen's own lock."""
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
