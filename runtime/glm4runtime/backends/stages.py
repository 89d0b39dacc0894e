"""A graph's stages in ONNX Runtime, one after another, as one session: for bundles built with ``--stages``.

:class:`StagedGraph` has of an ``onnxruntime.InferenceSession`` what runners use. A stage gives the residual stream in
memory that ONNX Runtime takes for it; on one device the next stage reads it there, and from device to device it goes
over the host's memory. Several devices at once have never run: docs/status.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from glm4runtime.backends.gpu_options import GpuOptions
from glm4runtime.backends.ort_session import device_of, open_session
from glm4runtime.backends.prepare import prepared_graph
from glm4runtime.backends.side_by_side import side_by_side
from glm4runtime.contract import INPUT_IDS, GraphName, Manifest

Place = tuple[str, int]  # a device in ONNX Runtime's words, and which
HOST: Place = ("cpu", 0)


def open_graphs(
    folder: Path,
    manifest: Manifest,
    names: Sequence[GraphName],
    *,
    provider: str,
    threads: int,
    gpu: GpuOptions,
    cache_bytes: int,
    options: Mapping[str, str],
) -> dict[str, Any]:
    """A bundle's graphs by name, each an InferenceSession or a :class:`StagedGraph`, all opened at the same time.

    cache_bytes: what the caches of all layers take beside them. options: the provider's, beside memory and device.
    Raises what :func:`open_session` raises.
    """
    parts = [(name, part) for name in names for part in manifest.parts(name).items()]
    devices = [gpu.of_stage(index) for _ in names for index in range(len(parts) // len(names))]
    calls = []
    for (_, (part, _)), device_id in zip(parts, devices, strict=True):
        own = dict(options)
        if provider == "cuda":
            there = [len(layers) for (_, (_, layers)), at in zip(parts, devices, strict=True) if at == device_id]
            share = cache_bytes * sum(there) // (len(names) * manifest.cache.layers)
            own |= gpu.on(device_id).cuda(share, len(there))
        prepared = prepared_graph(folder, manifest, part) if provider == "cpu" else None
        path = prepared or folder / manifest.graphs[part].file
        calls.append(partial(open_session, path, provider, threads, optimized=prepared is not None, options=own))
    sessions = side_by_side(calls)
    if manifest.stages is None:
        return dict(zip(names, sessions, strict=True))
    stages = [Stage(session, (device_of(provider), at)) for session, at in zip(sessions, devices, strict=True)]
    count = len(manifest.stages)
    return {name: StagedGraph(stages[index * count : (index + 1) * count]) for index, name in enumerate(names)}


@dataclass(frozen=True)
class Stage:
    """One stage: its InferenceSession, and where that computes."""

    session: Any
    place: Place

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Names of what it takes."""
        return frozenset(value.name for value in self.session.get_inputs())

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives; a stream comes first."""
        return tuple(value.name for value in self.session.get_outputs())


class StagedGraph:
    """The stages of one graph, to be bound and run as if it were whole."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)

    def io_binding(self) -> StagedBinding:
        """An empty binding over all stages."""
        return StagedBinding(self.stages)

    def run_with_iobinding(self, binding: StagedBinding, run_options: Any = None) -> None:
        """Run every stage over what was bound."""
        binding.run(run_options)


class StagedBinding:
    """Binds inputs and outputs to the stages that have them, and each stage's stream to the next.

    What is bound from elsewhere than a stage's own device is copied there at every run, as ONNX Runtime does once.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._bindings = [stage.session.io_binding() for stage in stages]
        self._elsewhere: list[dict[str, tuple[Any, ...]]] = [{} for _ in stages]
        self._shape: tuple[int, ...] | None = None  # of the ids, to which the streams belong
        self._streams: list[Any] = []  # OrtValues, as far as there were runs of that shape
        self._expect_streams()  # before any other output, so that they come first

    def bind_input(
        self, name: str, device: str, device_id: int, dtype: Any, shape: Sequence[int], address: int
    ) -> None:
        """As ``onnxruntime.IOBinding.bind_input``."""
        if name == INPUT_IDS and tuple(shape) != self._shape:
            self._shape = None  # until they are bound: an interrupt may come between
            self._expect_streams()
            self._shape = tuple(shape)
        bound = (name, device, device_id, dtype, shape, address)
        for stage, binding, elsewhere in zip(self._stages, self._bindings, self._elsewhere, strict=True):
            if name in stage.inputs:
                binding.bind_input(*bound)
                elsewhere.pop(name, None)
                if (device, device_id) != stage.place:
                    elsewhere[name] = bound

    def bind_output(
        self, name: str, device: str, device_id: int, dtype: Any, shape: Sequence[int], address: int
    ) -> None:
        """As ``onnxruntime.IOBinding.bind_output``."""
        for stage, binding in zip(self._stages, self._bindings, strict=True):
            if name in stage.outputs:
                binding.bind_output(name, device, device_id, dtype, shape, address)

    def run(self, options: Any) -> None:
        """Run the stages in their order."""
        for index, (stage, binding) in enumerate(zip(self._stages, self._bindings, strict=True)):
            for bound in self._elsewhere[index].values():
                binding.bind_input(*bound)
            stage.session.run_with_iobinding(binding, options)
            if index + 1 < len(self._stages):
                self._hand_over(index)

    def _expect_streams(self) -> None:
        """Have streams of a new shape; those of the last one would be taken for where they're to be written."""
        self._streams = []
        for index, (stage, binding) in enumerate(zip(self._stages[:-1], self._bindings[:-1], strict=True)):
            binding.bind_output(stage.outputs[0], *(HOST if self._leaves(index) else stage.place))

    def _hand_over(self, index: int) -> None:
        """Bind a stage's stream to the next one: once, or where that reads a copy of it, at every run."""
        known = index < len(self._streams)
        stream = self._streams[index] if known else self._bindings[index].get_outputs()[0]
        if not known or self._leaves(index):
            self._bindings[index + 1].bind_ortvalue_input(self._stages[index].outputs[0], stream)
        if not known:
            self._streams.append(stream)

    def _leaves(self, index: int) -> bool:
        """Whether a stage's stream goes to another device."""
        return self._stages[index].place != self._stages[index + 1].place
