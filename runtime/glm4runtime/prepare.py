"""Weights as this machine's kernels want them, saved once and mapped by every session: one copy in memory.

ONNX Runtime repacks weights when it opens a graph, on the heap, once a session: prefill and decode hold two copies of
what is one file. :func:`prepare` saves the repacked weights instead. Both graphs then map the same file, and so do all
processes on the machine. What was saved fits one CPU and one onnxruntime release; for another it's passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnxruntime as ort

from glm4runtime.contract import WEIGHTS, FieldReader, FileSpec, Manifest, UserError, check_file, sha256_of

FOLDER = "prepared"
_NOTE = "prepared.json"
_MIN_BYTES = "1024"  # smaller initializers stay in the graph


def prepare(folder: Path, manifest: Manifest) -> Path:
    """Save a bundle's graphs and weights for this machine's CPU, in the bundle's ``prepared`` folder; returns it.

    Takes the disk space of the weights once more, or twice where prefill and decode store theirs differently.
    Raises UserError where that can't be written, or the bundle isn't for the CPU.
    """
    if manifest.target != "cpu":
        raise UserError(f"{folder}: built for {manifest.target}; only cpu bundles are prepared")
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        for name, spec in manifest.graphs.items():
            (scratch / name).mkdir()
            _save(folder / spec.file, scratch / name / spec.file)
        first, *others = (scratch / name / WEIGHTS for name in manifest.graphs)
        digest = sha256_of(first)
        for other in others:
            if other.stat().st_size == first.stat().st_size and sha256_of(other) == digest:
                other.unlink()
                other.hardlink_to(first)  # the same pages for both graphs
        note = {**_wanted(manifest), "files": list_files(scratch)}
        (scratch / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return scratch.rename(folder / FOLDER)
    except OSError as error:
        raise UserError(f"{folder / FOLDER}: {error.strerror}; free some space and run again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepared_graph(folder: Path, manifest: Manifest, graph: str) -> Path | None:
    """The prepared file of a graph, or None: not prepared, or (with a warning) for another machine or bundle."""
    place = folder / FOLDER
    try:
        note = json.loads((place / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not _fits(note, manifest):
        warnings.warn(
            f"{place}: prepared for another CPU, onnxruntime or build, and passed over; "
            f"run `glm4export prepare {folder}` again",
            stacklevel=2,
        )
        return None
    path = place / graph / manifest.graphs[graph].file
    return path if path.is_file() else None


def check_prepared(folder: Path, manifest: Manifest, *, check_hashes: bool) -> None:
    """Raise BundleError where prepared files aren't as :func:`prepare` wrote them; their sha256 with ``check_hashes``.

    Nothing is checked of what :func:`prepared_graph` passes over.
    """
    place = folder / FOLDER
    try:
        note = json.loads((place / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not _fits(note, manifest):
        return
    files = FieldReader(note, str(place / _NOTE), f"run `glm4export prepare {folder}` again").child("files")
    for name, spec in manifest.graphs.items():
        for file in (f"{name}/{spec.file}", f"{name}/{WEIGHTS}"):
            told = FileSpec(files.child(file)("size", int), files.child(file)("sha256", str))
            check_file(place, file, told, check_hashes=check_hashes, by=f"its {_NOTE}")


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


def _fits(note: Any, manifest: Manifest) -> bool:
    """Whether what was prepared is for this machine and bundle, and by a version that lists its files."""
    return isinstance(note, dict) and _wanted(manifest).items() <= note.items() and "files" in note


def machine_key() -> str:
    """What repacked weights depend on: the onnxruntime release and the CPU's instruction sets, hashed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return hashlib.sha256("\n".join([ort.__version__, os.uname().machine, *features]).encode()).hexdigest()


def _save(source: Path, target: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", _MIN_BYTES)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
