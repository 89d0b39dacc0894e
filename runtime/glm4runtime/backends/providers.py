"""Choose the code that runs a bundle by ``provider``. Each one's packages, even numpy, are imported on opening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4runtime.backends.gpu_options import gpu_options
from glm4runtime.backends.graph_check import require_graphs, require_token_ids
from glm4runtime.backends.settings import Provider, Settings, require_slots
from glm4runtime.contract import TENSORRT, Manifest, UserError

if TYPE_CHECKING:
    from glm4runtime.backends.batch import BatchRunner
    from glm4runtime.backends.runner import Runner

ENGINE: Provider = "engine"
GRAPH_PROVIDERS = ("cpu", "cuda")  # of prefill and decode graphs
_CHUNK, _WIDENED_CHUNK = 512, 2048  # tokens


def default_provider(manifest: Manifest) -> str:
    """What a bundle runs on where nothing else is asked for: its target, and a bundle for TensorRT on its engine."""
    return ENGINE if manifest.target == TENSORRT else manifest.target


def default_chunk(manifest: Manifest, provider: str) -> int:
    """Prompt tokens in one run where nothing else is asked for.

    CUDA's kernels widen a quantized matrix to fp16 for every run of more than a few tokens, as often for 512 of them as
    for 2048: docs/gpu.md has the arithmetic.
    """
    return _WIDENED_CHUNK if provider == "cuda" and manifest.precision in ("int8", "int4") else _CHUNK


def open_runner(folder: Path, manifest: Manifest, settings: Settings) -> Runner:
    """Open a bundle's graphs or its engine for one sequence.

    Raises UserError where the settings do not fit the bundle or the machine; BundleError where the graphs, or what was
    prepared of them, are not what the manifest or the note beside them says.
    """
    opening = _Opening(folder, manifest, settings)
    if opening.provider == ENGINE:
        from glm4runtime.backends.trt import EngineRunner
        from glm4runtime.backends.trt_choice import choose_engine

        chosen = choose_engine(folder, manifest, check_hashes=settings.check_hashes)
        return EngineRunner(folder, manifest, chosen, **opening.sizes)
    opening.require_ready()
    if manifest.target == TENSORRT:
        from glm4runtime.backends.ort_step import OrtStepRunner

        return OrtStepRunner(folder, manifest, **opening.of_ort)
    from glm4runtime.backends.ort import OrtRunner

    return OrtRunner(folder, manifest, **opening.of_ort, **opening.of_graphs)


def open_batch_runner(folder: Path, manifest: Manifest, settings: Settings, *, slots: int) -> BatchRunner:
    """The same for ``slots`` sequences at once, 1 to 256.

    With ``invariant`` it's measured which widths of runs agree to the bit, and kept to:
    :mod:`glm4runtime.backends.invariance`. Raises what :func:`open_runner` raises, and UserError for caches that
    there's no memory for, where no widths agree, and where a step graph is to run on anything but an engine made for
    as many sequences.
    """
    require_slots(slots)
    opening = _Opening(folder, manifest, settings)
    if opening.provider == ENGINE:
        return _open_engine_batch(folder, manifest, settings, slots, opening.sizes)
    if manifest.target == TENSORRT:
        raise UserError(
            f"{folder}: built for {manifest.target}, whose graph takes one sequence in ONNX Runtime here, and several "
            f"on an engine (`glm4export engine {folder} --max-batch N`); or build it with `--target "
            f"{'` or `--target '.join(GRAPH_PROVIDERS)}`, or load it as a session for each"
        )
    opening.require_ready()
    from glm4runtime.backends.ort_batch import OrtBatchRunner

    return OrtBatchRunner(
        folder, manifest, slots=slots, invariant=settings.invariant, **opening.of_ort, **opening.of_graphs
    )


def _open_engine_batch(
    folder: Path, manifest: Manifest, settings: Settings, slots: int, sizes: Mapping[str, Any]
) -> BatchRunner:
    if settings.invariant:
        raise UserError(
            f"{folder}: invariant is not for engines: whether a sequence's bits depend on what runs beside it was "
            "never measured on one; load it with invariant=False, or serve it with --no-invariant"
        )
    from glm4runtime.backends.trt_batch import EngineBatchRunner, require_batch
    from glm4runtime.backends.trt_choice import choose_engine

    chosen = choose_engine(
        folder,
        manifest,
        check_hashes=settings.check_hashes,
        require=lambda spec: require_batch(spec, slots),
        remedy=f"bundles for {' and '.join(GRAPH_PROVIDERS)} need no engine",
    )
    return EngineBatchRunner(folder, manifest, chosen, slots=slots, **sizes)


class _Opening:
    """What settings come to for a bundle: checked, and as the runners' arguments."""

    def __init__(self, folder: Path, manifest: Manifest, settings: Settings) -> None:
        self._folder, self._manifest, self._settings = folder, manifest, settings
        self.provider = _chosen(folder, manifest, settings.provider)
        adapters = _adapter_files(folder, manifest, settings.adapters)
        self._gpu = gpu_options(settings.device_id, settings.gpu_mem_limit, self.provider, manifest.stages)
        if settings.cuda_graphs and (manifest.target == TENSORRT or self.provider != "cuda"):
            anyway = ", whose steps are captured anyway" if self.provider == ENGINE else ""
            raise UserError(
                f"cuda_graphs is for bundles for cuda on cuda; this one is for {manifest.target} and runs on "
                f"{self.provider}{anyway}; leave it out"
            )
        self.sizes: dict[str, Any] = {
            "max_seq_len": settings.max_seq_len,
            "prefill_chunk": settings.prefill_chunk or default_chunk(manifest, self.provider),
        }
        self.of_ort = {**self.sizes, "provider": self.provider, "threads": settings.threads, "gpu": self._gpu}
        self.of_graphs: dict[str, Any] = {"adapters": adapters, "cuda_graphs": settings.cuda_graphs}
        require_graphs(folder, manifest)
        require_token_ids(folder, manifest)

    def require_ready(self) -> None:
        """Raise where onnxruntime hasn't got the provider, or what was prepared for it isn't what its note says."""
        _require_ready(
            self._folder,
            self._manifest,
            self.provider,
            check_hashes=self._settings.check_hashes,
            devices=self._gpu.devices,
        )


def _adapter_files(folder: Path, manifest: Manifest, adapters: Mapping[str, str | Path] | None) -> dict[str, Path]:
    """Raises UserError where the bundle takes none."""
    if adapters and manifest.lora is None:
        raise UserError(
            f"{folder}: has no side paths for adapters; build it with --lora-slots N, or merge one with --lora"
        )
    return {name: Path(path) for name, path in (adapters or {}).items()}


def _chosen(folder: Path, manifest: Manifest, provider: str | None) -> str:
    """The provider that a bundle is run on. Raises UserError for one that doesn't fit it."""
    chosen = provider or default_provider(manifest)
    if manifest.target != TENSORRT and chosen not in GRAPH_PROVIDERS:
        raise UserError(
            f"provider {chosen!r} runs bundles built with `--target tensorrt`; {folder} is for {manifest.target}: "
            f"use {' or '.join(GRAPH_PROVIDERS)}, or build it again"
        )
    return chosen


def _require_ready(
    folder: Path, manifest: Manifest, chosen: str, *, check_hashes: bool, devices: Sequence[int]
) -> None:
    """Raise where onnxruntime hasn't got the provider, or what was prepared for it isn't what its note says."""
    from glm4runtime.backends.ort_session import require_provider
    from glm4runtime.backends.prepare import check_prepared

    for device_id in devices:
        require_provider(chosen, device_id)
    if chosen == "cpu" and manifest.target != TENSORRT:
        check_prepared(folder, manifest, check_hashes=check_hashes)
