"""Weights as this machine's kernels want them, saved once and mapped by every session: one copy in memory.

ONNX Runtime repacks weights when it opens a graph, on the heap, once per session. :func:`prepare` saves the repacked
weights instead, and all processes on the machine map the same file: it's for several workers, since a single session
holds one copy anyway, on huge pages, which a mapped file isn't on. What was saved fits one CPU and one onnxruntime
release; for another it's passed over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import onnxruntime as ort

from glm4runtime import signals
from glm4runtime.backends.int8_range import use_eight_bits
from glm4runtime.backends.side_by_side import side_by_side
from glm4runtime.contract import WEIGHTS, BundleError, FieldReader, FileSpec, Manifest, UserError, check_file, sha256_of
from glm4runtime.folder.layout import PREPARED, PREPARED_NOTE, prepared_strangers, read_prepared_note
from glm4runtime.folder.scratch import locked, scratch_folder, sweep

FOLDER = PREPARED
_MIN_BYTES = "1024"  # smaller initializers stay in the graph
_PREFIX = f".{FOLDER}-"


def prepare(folder: Path, manifest: Manifest) -> Path:
    """Save a bundle's graphs and weights for this machine's CPU, in the bundle's ``prepared`` folder; returns it.

    Takes the disk space of the weights once more, or twice where prefill and decode store theirs differently. Where
    another process prepares the same bundle, waits for it, and says so. Warns where a file system without hard links
    makes two files of what is one. Raises UserError where nothing can be written, where ``prepared`` holds files that
    aren't ours, or the bundle isn't for the CPU or doesn't generate text.
    """
    if manifest.target != "cpu":
        raise UserError(f"{folder}: built for {manifest.target}; only cpu bundles are prepared")
    if manifest.encoder is not None:
        raise UserError(f"{folder}: a bundle for {manifest.task}; only bundles that generate text are prepared")
    prepared = folder / FOLDER
    try:
        with locked(folder, "another prepare or build") as waited:
            if waited and _fits(read_prepared_note(folder), manifest):
                return prepared
            sweep(folder, _PREFIX)
            _require_ours(folder, manifest)
            with scratch_folder(folder, _PREFIX) as scratch:
                new = scratch / FOLDER
                new.mkdir()
                _save_graphs(folder, manifest, new)
                note = {**_wanted(manifest), "files": list_files(new)}
                (new / PREPARED_NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
                _require_ours(folder, manifest)  # again: it took a while
                with signals.held():
                    if prepared.exists():
                        prepared.rename(scratch / "earlier")
                    new.rename(prepared)
        return prepared
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{prepared}: {error.strerror}; free some space and run again") from None
        raise UserError(f"{prepared}: cannot be written ({error.strerror})") from None


def prepared_graph(folder: Path, manifest: Manifest, graph: str) -> Path | None:
    """The prepared file of a graph, or None: not prepared, or, with a warning, unreadable or for something else."""
    place = folder / FOLDER
    path = place / graph / manifest.graphs[graph].file
    again = f"and passed over; run `glm4export prepare {folder}` again"
    try:
        if _fits(read_prepared_note(folder), manifest):
            with path.open("rb"), path.with_name(WEIGHTS).open("rb"):
                return path
        reason = "prepared for another CPU, onnxruntime or build, "
    except OSError as error:
        if not place.exists():
            return None
        reason = f"cannot be read ({error.filename}: {error.strerror}), "
    except BundleError:
        reason = "damaged, "
    warnings.warn(f"{place}: {reason}{again}", stacklevel=2)
    return None


def _require_ours(folder: Path, manifest: Manifest) -> None:
    prepared = folder / FOLDER
    if not os.path.lexists(prepared):
        return
    if prepared.is_symlink() or not prepared.is_dir():
        raise UserError(f"{prepared}: exists and is not a folder; move it elsewhere")
    if found := prepared_strangers(folder, manifest):
        raise UserError(f"{folder}: {', '.join(found[:3])} was not made by prepare; move it elsewhere and run again")


def _save_graphs(folder: Path, manifest: Manifest, new: Path) -> None:
    for name, spec in manifest.graphs.items():
        (new / name).mkdir()
        _save(folder / spec.file, new / name / spec.file)
    written: dict[str, Path] = {}
    for path in (new / name / WEIGHTS for name in manifest.graphs):
        first = written.setdefault(sha256_of(path), path)
        if first is not path:
            _make_one(first, path)


def _make_one(first: Path, other: Path) -> None:
    """Let two equal files be one, whose pages both graphs then map."""
    link = other.with_name("link")
    try:
        link.hardlink_to(first)
    except OSError as error:
        size = first.stat().st_size / 1e9
        warnings.warn(
            f"{first.parents[1].name}: the file system has no hard links ({error.strerror}), so prefill and decode "
            f"keep a copy of the weights each: {size:.2f} GB more on disk, and in memory",
            stacklevel=2,
        )
        return
    link.replace(other)


def check_prepared(folder: Path, manifest: Manifest, *, check_hashes: bool) -> None:
    """Raise BundleError where prepared files aren't as :func:`prepare` wrote them; their sha256 with ``check_hashes``.

    Nothing is checked of what :func:`prepared_graph` passes over.
    """
    place = folder / FOLDER
    try:
        note = read_prepared_note(folder)
    except (OSError, BundleError):
        return
    if not _fits(note, manifest):
        return
    files = note.child("files")
    for name, spec in manifest.graphs.items():
        for file in (f"{name}/{spec.file}", f"{name}/{WEIGHTS}"):
            told = FileSpec(files.child(file)("size", int), files.child(file)("sha256", str))
            check_file(place, file, told, check_hashes=check_hashes, by=f"its {PREPARED_NOTE}")


def list_files(place: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder, by path in it."""
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    digests: dict[int, str] = {}  # of a file with two names, once
    for path in paths:
        inode = path.stat().st_ino
        digests[inode] = digests.get(inode) or sha256_of(path)
    return {
        path.relative_to(place).as_posix(): {"size": path.stat().st_size, "sha256": digests[path.stat().st_ino]}
        for path in paths
    }


def _wanted(manifest: Manifest) -> dict[str, Any]:
    return {"machine": machine_key(), "weights": manifest.files[WEIGHTS].sha256}


def _fits(note: FieldReader, manifest: Manifest) -> bool:
    """Whether what was prepared is for this machine and bundle, and by a version that lists its files."""
    return _wanted(manifest).items() <= note.data.items() and "files" in note.data


def machine_key() -> str:
    """What repacked weights depend on: the onnxruntime release and the CPU's instruction sets, hashed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return hashlib.sha256("\n".join([ort.__version__, os.uname().machine, *features]).encode()).hexdigest()


def _save(source: Path, target: Path) -> None:
    """Let onnxruntime write what it makes of a graph. Raises UserError where it can't."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", _MIN_BYTES)
    use_eight_bits(options)
    try:
        side_by_side([lambda: ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])])
    except Exception as error:  # onnxruntime's own classes
        raise UserError(f"{source}: onnxruntime cannot prepare it: {error}") from None
