"""Tell our files in a bundle's folder (listed in its manifest, or made by our tools beside them) from the user's.

Everything else is the user's, and is never removed. The names of what isn't listed are all here. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from glm4runtime.contract import (
    MANIFEST,
    WEIGHTS,
    BundleError,
    FieldReader,
    FileSpec,
    Manifest,
    read_json,
    sha256_of,
)
from glm4runtime.contract.engine_spec import FOLDER as ENGINES
from glm4runtime.folder.scratch import is_scratch, names_in

PREPARED = "prepared"  # prepare.py's folder
PREPARED_NOTE = "prepared.json"  # in it
ORT_CACHES = {provider: f"{ENGINES}/onnxruntime-{provider}" for provider in ("tensorrt", "tensorrt-rtx")}
_LOST_AND_FOUND = "lost+found"  # what a new file system holds

_MADE = (".bin", ".onnx", ".engine")  # nobody edits these: where one isn't as listed, a copy broke off or a disk failed


def entries(folder: Path) -> list[str]:
    """The names in a folder, sorted, without our scratch folders and a file system's own ``lost+found``."""
    own = {_LOST_AND_FOUND} if folder.is_mount() else set()
    return [name for name in names_in(folder) if name not in own and not is_scratch(folder / name)]


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """What in a bundle's folder is not ours, folders with a slash: unlisted, or edited since the manifest was written.

    Listed weights, graphs and engines are ours even where they are damaged, so that the bundle can be built again.
    Raises OSError where the folder can't be read.
    """
    return list(_strangers(folder, PurePosixPath(), manifest))


def read_prepared_note(folder: Path) -> FieldReader:
    """What prepare wrote beside its files in a bundle's folder. Raises OSError, or BundleError where it's damaged."""
    path, remedy = folder / PREPARED / PREPARED_NOTE, f"run `glm4export prepare {folder}` again"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: not text ({error}); {remedy}") from None
    return read_json(text, str(path), remedy)


def prepared_strangers(folder: Path, manifest: Manifest) -> list[str]:
    """What in the folder ``prepared`` of a bundle is not prepare's, as in :func:`strangers`; all, without its note."""
    prepared = folder / PREPARED
    try:
        told = read_prepared_note(folder).data.keys()
    except (FileNotFoundError, BundleError):
        told = dict[str, object]().keys()
    if not told >= {"machine", "weights"}:
        return [f"{PREPARED}/"] if names_in(prepared) else []
    ours = {f"{name}/{file}" for name, spec in manifest.graphs.items() for file in (spec.file, WEIGHTS)}
    found = (path.relative_to(prepared) for path in sorted(prepared.rglob("*")) if not _is_folder(path))
    return [f"{PREPARED}/{name}" for name in map(str, found) if name not in {PREPARED_NOTE, *ours}]


def _strangers(folder: Path, place: PurePosixPath, manifest: Manifest) -> Iterator[str]:
    folders = {ENGINES, *(str(parent) for name in manifest.files for parent in PurePosixPath(name).parents)}
    for entry in entries(folder / place):
        name = str(place / entry)
        path = folder / name
        if not _is_folder(path):
            if name != MANIFEST and not _is_ours(path, manifest.files.get(name)):
                yield f"{name} (changed)" if name in manifest.files else name
        elif name == PREPARED:
            yield from prepared_strangers(folder, manifest)
        elif name in folders:
            yield from _strangers(folder, place / entry, manifest)
        elif name not in ORT_CACHES.values():
            yield f"{name}/"


def _is_ours(path: Path, spec: FileSpec | None) -> bool:
    if spec is None or not path.is_file():
        return False
    if path.suffix in _MADE:
        return True
    return path.stat().st_size == spec.size and sha256_of(path) == spec.sha256


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
