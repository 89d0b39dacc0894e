"""Which engine of a bundle runs on this machine, and whether its files are what was built.

Never run on a GPU: docs/status.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4runtime.backends.cuda import Cuda, open_cuda
from glm4runtime.backends.gpu import gpu_capability
from glm4runtime.backends.trt_module import import_flavour, version_of
from glm4runtime.contract import BundleError, FileSpec, Manifest, UserError, check_file
from glm4runtime.contract.engine_spec import EngineSpec, read_engine_specs

ALONE = "`--provider cpu` runs the same graph in ONNX Runtime, without a GPU"  # remedy where one sequence is enough


@dataclass(frozen=True)
class Chosen:
    """An engine that fits: its sidecar, its flavour's module, and the device's calls."""

    spec: EngineSpec
    module: Any
    cuda: Cuda


def choose_engine(
    folder: Path,
    manifest: Manifest,
    *,
    check_hashes: bool,
    remedy: str = ALONE,
    require: Callable[[EngineSpec], None] = lambda spec: None,
) -> Chosen:
    """The first engine of the bundle that fits this machine, and of which ``require`` has no complaint (UserError).

    Raises UserError with what is missing, or with the reason for every engine that doesn't fit, and ``remedy``.
    """
    specs = read_engine_specs(folder)
    if not specs:
        build = "`glm4export engine` builds one, with --max-batch N for many sequences"
        raise UserError(f"{folder}: no engine in the bundle ({build}); {remedy}")
    reasons = []
    for spec in specs:
        try:
            module = import_flavour(spec.flavour)
            cuda = open_cuda(spec.flavour)
            spec.require(
                manifest,
                flavour=spec.flavour,
                version=version_of(module),
                compute_capability=gpu_capability() or "unknown",
            )
            require(spec)
        except UserError as error:
            reasons.append(str(error))
            continue
        _check_files(folder, manifest, spec, check_hashes)
        return Chosen(spec, module, cuda)
    raise UserError(f"{folder}: no engine that runs here: {'; '.join(dict.fromkeys(reasons))}; {remedy}")


def _check_files(folder: Path, manifest: Manifest, spec: EngineSpec, check_hashes: bool) -> None:
    """Compare the engine with its sidecar; where hashes count, both must be the manifest's.

    They do for a version-compatible engine always: loading it runs the code in it.
    """
    told, sidecar = FileSpec(spec.size, spec.sha256), Path(spec.file).with_suffix(".json").as_posix()
    if check_hashes or spec.version_compatible:
        for name in (sidecar, spec.file):
            if name not in manifest.files:
                raise BundleError(f"{folder / name}: the manifest doesn't list it; build the engine again")
        if manifest.files[spec.file] != told:
            raise BundleError(f"{folder / sidecar}: the manifest has another engine; build the engine again")
        if not check_hashes:
            check_file(folder, sidecar, manifest.files[sidecar], check_hashes=True)
    check_file(folder, spec.file, told, check_hashes=spec.version_compatible and not check_hashes, by="its sidecar")
