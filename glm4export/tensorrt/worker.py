"""Builds one engine in a process of its own: ``python -m glm4export.tensorrt.worker FD``, a Job as JSON on stdin.

A process of its own, because compiling is one long call into TensorRT (6 of 7.5 s of a small build without a single
call of its progress monitor) which only the process's end interrupts at once; because a build that runs out of memory
or crashes must not take the caller with it; and because its peak memory is then its own. Events go to file descriptor
FD, a JSON object a line. It ends when its standard input does, as it does when the caller is killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4export.tensorrt.flavour import BY_NAME, Flavour
from glm4export.tensorrt.network import Log, count_layers, logger, new_network, parse, require_fused
from glm4runtime.backends.gpu import gpu_multiprocessors
from glm4runtime.backends.trt_module import version_of
from glm4runtime.contract import LOGIT_ROWS, UserError, installing
from glm4runtime.contract.engine_spec import PLUGIN, Profile

Say = Callable[[dict[str, Any]], None]
ALIASED = "aliased"
_SAMPLE_SECONDS = 0.05
_SAMPLES_TOLD = 20  # one in so many is told


@dataclass(frozen=True)
class Job:
    """One engine to build. Sizes in bytes; None leaves TensorRT's own default."""

    flavour: str
    compute_capability: str
    graph: str  # its path; weights.bin lies beside it
    engine: str  # path to write
    attention: str  # of the graph, STANDARD, PLUGIN or FULL
    layers: int  # decoder layers of the model, to check what was recognised
    profiles: tuple[Profile, ...]
    optimization_level: int | None
    workspace: int | None
    timing_cache: str | None
    version_compatible: bool
    weight_streaming: bool
    plugin_cache: str = ALIASED  # or "bound": what the plugin tells TensorRT of the cache that it updates

    def to_json(self) -> str:
        """The job on one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that :meth:`to_json` wrote."""
        data = json.loads(text)
        profiles = tuple(
            Profile(p["name"], tuple(p["batch"]), tuple(p["seq"]), tuple(p["rows"])) for p in data.pop("profiles")
        )
        return cls(**data, profiles=profiles)


def build(job: Job, watch: Watch) -> dict[str, Any]:
    """Parse, compile and write one engine; returns what the sidecar and the report need. Raises UserError."""
    flavour = BY_NAME[job.flavour]
    module, log = flavour.load(), Log()
    trt_logger = logger(module, log)
    builder = module.Builder(trt_logger)
    network = new_network(module, builder)
    with _graph(job) as graph:
        parser = parse(module, network, trt_logger, graph, log)
    counts = count_layers(network)
    require_fused(counts, job.layers, job.attention)
    config = configure(module, builder, network, job, flavour)
    monitor = _monitor(module, watch)
    config.progress_monitor = monitor
    with Path(job.engine).open("wb") as file:
        writer = _writer(module, file, watch)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built or not writer.size:
        raise UserError(f"{job.flavour} {version_of(module)} could not build the engine: {log.text()}")
    _save_timing_cache(config, job)
    del parser, network
    return {
        "version": version_of(module),
        "layers": counts,
        "weight_bytes": log.sizes.get("weights"),
        "scratch_bytes": log.sizes.get("activation"),
        "size": writer.size,
        "sha256": writer.digest.hexdigest(),
    }


@contextmanager
def _graph(job: Job) -> Iterator[Path]:
    """The graph to parse; with plugins, one rewritten for them, beside the weights that both name, while parsed."""
    graph = Path(job.graph)
    if job.attention != PLUGIN:
        yield graph
        return
    from glm4export.tensorrt.plugin.graph import write_plugin_graph  # Triton and the compiler's packages
    from glm4export.tensorrt.plugin.register import register

    register(int(job.compute_capability.replace(".", "")), aliased=job.plugin_cache == ALIASED)
    rewritten = graph.with_name(f".plugins-{os.getpid()}.onnx")
    try:
        write_plugin_graph(graph, rewritten, programs=2 * (gpu_multiprocessors() or 1))
        yield rewritten
    finally:
        rewritten.unlink(missing_ok=True)


def configure(module: Any, builder: Any, network: Any, job: Job, flavour: Flavour) -> Any:
    """The builder's configuration for a job, every refusal an error."""
    config = builder.create_builder_config()
    for profile in job.profiles:
        optimization = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            optimization.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape), profile))
        if config.add_optimization_profile(optimization) < 0:
            raise UserError(f"{job.flavour} refuses the optimization profile {profile}; please report this")
    if flavour.cross_compiles:
        capability = flavour.capabilities(module)[job.compute_capability]
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise UserError(f"{job.flavour} refuses compute capability {job.compute_capability}")
    if job.attention == PLUGIN:  # the cache is an output that is an input of the first plugin
        config.set_preview_feature(module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, job.workspace)
    if job.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if job.weight_streaming:
        config.set_flag(module.BuilderFlag.WEIGHT_STREAMING)
    if job.timing_cache is not None:
        path = Path(job.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise UserError(f"{path}: not a timing cache of this TensorRT and GPU; name another file, or remove it")
    return config


def shapes(name: str, declared: tuple[int, ...], profile: Profile) -> tuple[tuple[int, ...], ...]:
    """Least, best and most dims of one input of the graph; a dim of -1 is dynamic."""
    width = profile.rows if name == LOGIT_ROWS else profile.seq
    ranges = [profile.batch if index == 0 else width for index in range(len(declared))]
    return tuple(
        tuple(dim if dim >= 0 else ranges[index][end] for index, dim in enumerate(declared)) for end in range(3)
    )


def _save_timing_cache(config: Any, job: Job) -> None:
    """What was measured, for the next build; replaced in one step, since builds may share the file."""
    if job.timing_cache is None:
        return
    path = Path(job.timing_cache)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(memoryview(config.get_timing_cache().serialize()))
    scratch.replace(path)


def _monitor(module: Any, watch: Watch) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Tells the outermost phases. It never asks TensorRT to stop: the caller ends the process, see above."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                watch.doing(name.lower())

        def phase_finish(self, name: str) -> None: ...

        def step_complete(self, name: str, step: int) -> bool:
            return True

    return Monitor()


def _writer(module: Any, file: Any, watch: Watch) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        """Writes and hashes the engine as it comes, so that no second copy of it is in memory."""

        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.size, self.digest = 0, hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:  # TensorRT asks for a count, and knows no exceptions
                self.error = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            watch.doing(f"write {self.size / 1e9:.2f} GB")
            return len(data)

    return Writer()


class Watch:
    """Tells every second what the build is doing and its memory, and keeps the most of it that it saw.

    Own memory is the process's heap and such. Resident is that with the pages of the mapped weights file, which Linux
    takes back whenever memory is asked for.
    """

    def __init__(self, say: Say) -> None:
        self.own = 0
        self._say = say
        self._doing = "parse"
        threading.Thread(target=self._watch, daemon=True).start()

    def doing(self, what: str) -> None:
        """From now on the build is doing this."""
        self._doing = what

    def peak(self) -> dict[str, int]:
        """Bytes: ``own`` by samples, ``resident`` as the kernel's high-water mark."""
        return {"own": self.own, "resident": _status()["VmHWM"]}

    def _watch(self) -> None:
        for sample in itertools.count():
            own = _status()["RssAnon"]
            self.own = max(self.own, own)
            if sample % _SAMPLES_TOLD == 0:
                self._say({"doing": self._doing, "own": own})
            time.sleep(_SAMPLE_SECONDS)


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def _end_with_the_caller() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> int:
    """Run one job; the last event is ``done`` or ``error``."""
    lock = threading.Lock()
    with os.fdopen(int(sys.argv[1]), "w") as events:

        def say(event: dict[str, Any]) -> None:
            with lock:
                print(json.dumps(event), file=events, flush=True)

        job = Job.from_json(sys.stdin.readline())
        threading.Thread(target=_end_with_the_caller, daemon=True).start()
        watch = Watch(say)
        try:
            say({"done": {**build(job, watch), "memory": watch.peak()}})
        except UserError as error:
            say({"error": str(error)})
        except ModuleNotFoundError as error:
            needed = installing("compile", "tensorrt")
            say({"error": f"{error.name} is not installed, which engines with --attention plugin need; {needed}"})
        except OSError as error:
            say({"errno": error.errno, "error": str(error)})
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without the libraries' own exit: TensorRT's takes seconds to free an engine's memory
