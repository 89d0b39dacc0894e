"""Choose the code that runs a bundle by ``provider``. Each one's packages, even numpy, are imported on opening."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from glm4runtime.backends.gpu_options import gpu_options
from glm4runtime.backends.graph_check import require_graphs, require_token_ids
from glm4runtime.contract import TENSORRT, Manifest, UserError, shown

if TYPE_CHECKING:
    from glm4runtime.backends.batch import BatchRunner
    from glm4runtime.backends.runner import Runner

Provider = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx", "engine"]
ENGINE: Provider = "engine"
GRAPH_PROVIDERS = ("cpu", "cuda")  # of prefill and decode graphs
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
_MOST_SLOTS = 256  # more are a mistake: a step of so many takes as long as they do one by one
_CHUNK, _WIDENED_CHUNK = 512, 2048  # tokens
_THREADS_EACH = 16  # of a processor: more are a mistake, not a choice


def default_provider(manifest: Manifest) -> str:
    """What a bundle runs on where nothing else is asked for: its target, and a bundle for TensorRT on its engine."""
    return ENGINE if manifest.target == TENSORRT else manifest.target


def default_chunk(manifest: Manifest, provider: str) -> int:
    """Prompt tokens in one run where nothing else is asked for.

    CUDA's kernels widen a quantized matrix to fp16 for every run of more than a few tokens, as often for 512 of them as
    for 2048: docs/gpu.md has the arithmetic.
    """
    return _WIDENED_CHUNK if provider == "cuda" and manifest.precision in ("int8", "int4") else _CHUNK


def require_settings(
    *,
    provider: Any = None,
    threads: Any = 0,
    max_seq_len: Any = None,
    prefill_chunk: Any = None,
    check_hashes: Any = False,
    invariant: Any = False,
    truncate: Any = False,
    huge_pages: Any = False,
    cuda_graphs: Any = False,
    adapters: Any = None,
) -> None:
    """Raise UserError for arguments of ``glm4runtime.load`` or ``load_encoder`` that fit no bundle on this machine."""
    if provider is not None and provider not in PROVIDERS:
        raise UserError(f"provider {shown(provider)} is not known; known: {', '.join(PROVIDERS)}")
    if prefill_chunk is not None:
        _require_number("prefill_chunk", prefill_chunk, 1)
    if max_seq_len is not None:
        _require_number("max_seq_len", max_seq_len)  # the runner tells its range, which is the bundle's
    _require_number("threads", threads, 0)
    processors = os.cpu_count() or 1
    if threads > (most := _THREADS_EACH * processors):
        raise UserError(
            f"threads={shown(threads)}: at most {most} on this machine, which has {processors} processors; "
            "0 lets ONNX Runtime choose"
        )
    _require_adapters(adapters)
    switches = {"check_hashes": check_hashes, "invariant": invariant, "truncate": truncate, "huge_pages": huge_pages}
    switches["cuda_graphs"] = cuda_graphs
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"{name}={shown(value)} is not True or False")


def _require_adapters(adapters: Any) -> None:
    if adapters is None:
        return
    if not isinstance(adapters, Mapping):
        raise UserError(f"adapters={shown(adapters)} is not a dict of files by name")
    for name, path in adapters.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UserError(f"adapters: {shown(name)} is not a name: a text that can be printed")
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"adapters: {name} is {shown(path)}, expected the path of a file")


def _require_number(name: str, value: Any, least: int | None = None) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is not a whole number")
    if least is not None and number < least:
        raise UserError(f"{name}={shown(value)} must be at least {least}")


def open_runner(
    folder: Path,
    manifest: Manifest,
    *,
    provider: str | None,
    threads: int,
    max_seq_len: int | None,
    prefill_chunk: int | None = None,
    check_hashes: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
    device_id: Any = 0,
    gpu_mem_limit: Any = None,
    cuda_graphs: bool = False,
) -> Runner:
    """Open a bundle's graphs or its engine; arguments as :func:`glm4runtime.load`'s.

    Raises UserError where the provider does not fit the bundle or the machine, or sizes are out of range; BundleError
    where the graphs, or what was prepared of them, are not what the manifest or the note beside them says.
    """
    require_settings(
        provider=provider,
        threads=threads,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        check_hashes=check_hashes,
    )
    chosen = _chosen(folder, manifest, provider)
    has_step = manifest.target == TENSORRT
    files = _adapter_files(folder, manifest, adapters)
    gpu = gpu_options(device_id, gpu_mem_limit, chosen, manifest.stages)
    if cuda_graphs and (has_step or chosen != "cuda"):
        raise UserError(
            f"cuda_graphs is for bundles for cuda on cuda; this one is for {manifest.target} and runs on {chosen}"
            + (", whose steps are captured anyway" if chosen == ENGINE else "")
            + "; leave it out"
        )
    prefill_chunk = prefill_chunk or default_chunk(manifest, chosen)
    require_graphs(folder, manifest)
    require_token_ids(folder, manifest)
    if chosen == ENGINE:
        from glm4runtime.backends.trt import open_engine

        return open_engine(
            folder, manifest, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk, check_hashes=check_hashes
        )
    _require_ready(folder, manifest, chosen, check_hashes=check_hashes, devices=gpu.devices)
    from glm4runtime.backends.ort import OrtRunner
    from glm4runtime.backends.ort_step import OrtStepRunner

    settings: dict[str, Any] = {
        "provider": chosen,
        "threads": threads,
        "max_seq_len": max_seq_len,
        "prefill_chunk": prefill_chunk,
        "gpu": gpu,
    }
    if has_step:
        return OrtStepRunner(folder, manifest, **settings)
    return OrtRunner(folder, manifest, **settings, adapters=files, cuda_graphs=cuda_graphs)


def open_batch_runner(
    folder: Path,
    manifest: Manifest,
    *,
    slots: int,
    provider: str | None,
    threads: int,
    max_seq_len: int | None,
    prefill_chunk: int | None = None,
    check_hashes: bool = False,
    invariant: bool = True,
    adapters: Mapping[str, str | Path] | None = None,
    device_id: Any = 0,
    gpu_mem_limit: Any = None,
) -> BatchRunner:
    """Open a bundle's graphs for ``slots`` sequences at once, 1 to 256; the other arguments as :func:`open_runner`'s.

    invariant: measure which widths of runs agree to the bit, and keep to them:
    :mod:`glm4runtime.backends.invariance`. Raises what :func:`open_runner` raises, and UserError for a bundle for
    TensorRT, for caches that there's no memory for, and where no widths agree.
    """
    require_settings(
        provider=provider,
        threads=threads,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        check_hashes=check_hashes,
        invariant=invariant,
        adapters=adapters,
    )
    _require_number("slots", slots, 1)
    if slots > _MOST_SLOTS:
        raise UserError(f"slots={shown(slots)}: at most {_MOST_SLOTS} sequences run at once")
    chosen = _chosen(folder, manifest, provider)
    if manifest.target == TENSORRT:
        raise UserError(
            f"{folder}: built for {manifest.target}, whose graph takes one sequence; for several at once build it with "
            f"`--target {'` or `--target '.join(GRAPH_PROVIDERS)}`, or load it as a session for each"
        )
    files = _adapter_files(folder, manifest, adapters)
    gpu = gpu_options(device_id, gpu_mem_limit, chosen, manifest.stages)
    require_graphs(folder, manifest)
    require_token_ids(folder, manifest)
    _require_ready(folder, manifest, chosen, check_hashes=check_hashes, devices=gpu.devices)
    from glm4runtime.backends.ort_batch import OrtBatchRunner

    return OrtBatchRunner(
        folder,
        manifest,
        slots=slots,
        provider=chosen,
        threads=threads,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk or default_chunk(manifest, chosen),
        invariant=invariant,
        adapters=files,
        gpu=gpu,
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
    if chosen not in PROVIDERS:
        raise UserError(f"provider {chosen!r} is not known; known: {', '.join(PROVIDERS)}")
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
