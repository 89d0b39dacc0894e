"""A bundle's stages on several machines, each a Ray actor: one sequence, for a model that no machine holds alone.

>>> from glm4serve.deploy.ray_stages import load_stages
>>> session = load_stages("glm-4-32b", threads=8)  # a session as glm4runtime.load's

Here are the tokens and the logits; an actor has a stage's weights and its layers' cache. A residual stream goes from
actor to actor, and only the last one's logits come back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm4runtime import Session
from glm4runtime.backends.cache import Cache
from glm4runtime.backends.gpu_options import ANY_GPU
from glm4runtime.backends.graph_check import graphs_to_open, require_graphs, require_token_ids
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.backends.ort_session import device_of, open_session, require_provider
from glm4runtime.backends.providers import default_chunk, default_provider
from glm4runtime.backends.settings import Provider, Settings
from glm4runtime.backends.stages import HOST, Stage, StagedGraph
from glm4runtime.contract import LOGITS, GraphName, UserError, installing, read_manifest, shown
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.files import read_text_files
from glm4serve.deploy.ray_room import require_room

_CACHED = ("past_key_values.", "present.")


def load_stages(
    bundle: str | Path,
    *,
    provider: Provider | None = None,
    threads: int = 1,
    max_seq_len: int | None = None,
    prefill_chunk: int | None = None,
) -> Session:
    """Open a bundle of stages over the cluster that ``ray.init`` joined, an actor for each, on as many machines.

    bundle: a folder that every machine has under this path. threads: of each actor, as many CPUs are reserved; on
    ``cuda`` a GPU too. Others as :func:`glm4runtime.load`'s. A machine that is lost ends the session: what it is asked
    raises UserError from then on.

    Raises UserError where Ray is missing, settings don't fit, or the cluster is too small for the actors (where others
    have its CPUs, they are waited for); BundleError where the folder isn't a whole bundle.
    """
    ray = _ray()
    Settings(provider=provider, threads=threads, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)  # checks them
    folder = Path(bundle).resolve()
    manifest = read_manifest(folder)
    if manifest.stages is None:
        raise UserError(f"{folder}: has no stages; build it with --stages N, one for each machine")
    chosen = provider or default_provider(manifest)
    if "bfloat16" in {spec.dtype for graph in manifest.graphs.values() for spec in graph.outputs}:
        raise UserError(f"{folder}: bf16 streams can't be sent; build it with --precision fp16")
    require_graphs(folder, manifest)
    require_token_ids(folder, manifest)
    names = graphs_to_open(folder, manifest)
    length = max_seq_len or manifest.cache.max_seq_len
    cpus, gpus = max(1, threads), int(chosen == "cuda")
    require_room("stages", len(manifest.stages), {"CPU": cpus, "GPU": gpus}, "the cluster", ray.cluster_resources())
    actor = ray.remote(StageActor).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")
    actors = [actor.remote(folder, names, index, chosen, threads, length) for index in range(len(manifest.stages))]
    graphs: dict[str, StagedGraph] = {}
    for name in names:
        specs = [manifest.graphs[part] for part in manifest.parts(name)]
        ends = [([spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs]) for graph in specs]
        sessions = [_Remote(ray, each, name, *both) for each, both in zip(actors, ends, strict=True)]
        graphs[name] = StagedGraph([Stage(session, HOST) for session in sessions])
    runner = RemoteRunner(
        folder,
        manifest,
        provider="cpu",
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk or default_chunk(manifest, chosen),
        graphs=graphs,
    )
    _wait(ray, [each.ready.remote() for each in actors])  # they open their weights at the same time
    return Session(folder, manifest, runner, BundleText(folder, read_text_files(folder), None))


class RemoteRunner(OrtRunner):
    """Runs whose caches are elsewhere: the one that it has itself is never touched, and takes no memory."""

    def cache_bits(self, rows: int) -> list[bytes]:
        return []

    def cache_clipped(self) -> None:
        return None


class StageActor:
    """One stage of each graph, with the cache of its layers: what runs on a machine."""

    def __init__(
        self, folder: Path, names: Sequence[GraphName], stage: int, provider: str, threads: int, max_seq_len: int
    ) -> None:
        manifest = read_manifest(folder)
        require_provider(provider)
        require_graphs(folder, manifest)
        options = ANY_GPU.cuda() if provider == "cuda" else {}
        device, parts = device_of(provider), {name: list(manifest.parts(name).items())[stage] for name in names}
        layers = next(iter(parts.values()))[1]
        spec = dataclasses.replace(manifest.cache, layers=len(layers))
        self._cache = Cache(spec, max_seq_len, device, first_layer=layers.start)
        self._bound: dict[str, tuple[Any, Any, str]] = {}
        for name, (part, _) in parts.items():
            graph = manifest.graphs[part]
            session = open_session(folder / graph.file, provider, threads, options=options)
            binding, given = session.io_binding(), graph.outputs[0].name
            binding.bind_output(given)
            self._cache.bind(binding)
            self._bound[name] = session, binding, given

    def ready(self) -> None:
        """Nothing: answered when the stage is open."""

    def run(self, graph: str, inputs: dict[str, np.ndarray], stream: tuple[str, np.ndarray] | None) -> Any:
        """Run a graph's stage; stream: the input that the stage before gave. What the next one takes, or logits."""
        session, binding, given = self._bound[graph]
        for name, value in (inputs | dict([stream] if stream else [])).items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(given)  # anew, since its shape may be another
        session.run_with_iobinding(binding)
        value = binding.get_outputs()[0].numpy()
        return value if given == LOGITS else (given, value)


class _Named(NamedTuple):
    name: str


class _Remote:
    """Of an InferenceSession what a stage needs, over an actor."""

    def __init__(self, ray: Any, actor: Any, graph: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._ray, self._actor, self._graph = ray, actor, graph
        self._inputs, self._outputs = (
            [_Named(n) for n in ends if not n.startswith(_CACHED)] for ends in (inputs, outputs)
        )

    def get_inputs(self) -> list[_Named]:
        """What it takes from here."""
        return self._inputs

    def get_outputs(self) -> list[_Named]:
        """What it gives."""
        return self._outputs

    def io_binding(self) -> _Binding:
        """An empty binding."""
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: Any = None) -> None:
        """Ask the actor; for a stream nothing is waited for, and it stays where it is."""
        inputs = {name: read() for name, read in binding.inputs.items()}
        stream = None if binding.before is None else binding.before.given
        binding.given = self._actor.run.remote(self._graph, inputs, stream)
        if LOGITS in binding.outputs:
            np.copyto(binding.outputs[LOGITS](), _wait(self._ray, binding.given))


class _Binding:
    """Memory by the names of inputs and outputs, read and written at each run."""

    def __init__(self) -> None:
        self.inputs: dict[str, Callable[[], np.ndarray]] = {}
        self.outputs: dict[str, Callable[[], np.ndarray]] = {}
        self.before: _Binding | None = None  # the stage's that gives the stream
        self.given: Any = None  # by the last run: a reference of Ray's

    def bind_input(self, name: str, _device: str, _id: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        self.inputs[name] = lambda: _memory(dtype, shape, address).copy()

    def bind_output(self, name: str, _device: str, _id: int, *memory: Any) -> None:
        if memory:
            self.outputs[name] = lambda: _memory(*memory)

    def bind_ortvalue_input(self, _name: str, value: _Binding) -> None:
        self.before = value

    def get_outputs(self) -> list[_Binding]:
        return [self]


def _memory(dtype: Any, shape: Sequence[int], address: int) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def _wait(ray: Any, asked: Any) -> Any:
    """What an actor answers. Raises UserError where it can't, or is no more."""
    try:
        return ray.get(asked)
    except ray.exceptions.RayError as error:  # an actor or a machine that died, memory, a stream that was lost
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from None
        reason = shown((str(error).strip().splitlines() or ["no message"])[-1][:200])
        raise UserError(
            f"a stage is lost, or failed ({type(error).__name__}: {reason}); load the bundle again"
        ) from None


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its makers of every cluster otherwise
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(f"Ray is not installed ({error}); {installing('ray')}") from None
    return ray
