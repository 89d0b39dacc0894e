"""A bundle as a model in a repository of NVIDIA's Triton Inference Server: REPOSITORY/NAME, replaced in one step.

Causal language models have the bundle in ``1/bundle`` beside the Python that runs it; others are ``1`` itself, which
Triton's ONNX Runtime reads. ``manifest.json`` lists what is ours beside the bundle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from glm4export.bundle.folder import PRODUCER, is_free, new_bundle, refuse_strangers, require_space
from glm4export.bundle.swap import OutputError
from glm4runtime.contract import (
    CAUSAL_LM,
    MANIFEST,
    TENSORRT,
    BundleError,
    FileSpec,
    Manifest,
    UserError,
    read_json,
    read_manifest,
    sha256_of,
)
from glm4runtime.folder.layout import strangers
from glm4serve.deploy import triton as backend
from glm4serve.deploy.triton.config import encoder_config, engine_config

CONFIG = "config.pbtxt"
_KIND = "triton-model"
_VERSION = "1"
_PYTHON = ("model.py", "tensors.py")
_CACHE = f"{_VERSION}/__pycache__"  # Python makes it where it may
_DEFAULTS = {"drain": 30}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def new_model(
    bundle: Path, repository: Path, name: str, settings: Mapping[str, object], *, slots: int, link: bool = False
) -> Path:
    """Make the model's folder in the repository, or put it in the place of an earlier one; returns it.

    settings: further arguments of ``Engine.load``, and ``drain``, for language models only; None is the default. slots:
    theirs too; of others the most rows in a run. link: a symbolic link to the bundle instead of its files. Those are
    hard links where they're possible, and copies elsewhere: the folder can be moved alone.

    Raises UserError for a name or a bundle that doesn't do, OutputError as :func:`glm4export.bundle.folder.new_bundle`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: expected letters, digits, _, . and -, as Triton's addresses have them")
    manifest = read_manifest(bundle)
    if manifest.target == TENSORRT:
        raise UserError(f"{bundle}: built for tensorrt; a repository takes bundles for cpu and cuda, build it for one")
    if manifest.task == CAUSAL_LM:
        place, config = f"{_VERSION}/bundle", engine_config(name, {**_DEFAULTS, **_given(settings), "slots": slots})
    elif given := sorted(_given(settings)):
        raise UserError(f"{bundle}: a bundle for {manifest.task}, which has no engine: leave out {', '.join(given)}")
    else:
        place, config = _VERSION, encoder_config(name, manifest, slots)
    out = repository / name
    with new_bundle(out, [bundle], _require_ours) as folder:
        (folder / place).parent.mkdir(exist_ok=True)
        if link:
            (folder / place).symlink_to(bundle.resolve(), target_is_directory=True)
        else:
            _place(bundle, folder / place, manifest)
        (folder / CONFIG).write_text(config, encoding="utf-8")
        if manifest.task == CAUSAL_LM:
            for file in _PYTHON:
                shutil.copyfile(Path(backend.__path__[0]) / file, folder / _VERSION / file)
        ours = (CONFIG, *(f"{_VERSION}/{file}" for file in _PYTHON if manifest.task == CAUSAL_LM))
        listed = {file: FileSpec((folder / file).stat().st_size, sha256_of(folder / file)) for file in ours}
        note = {
            "producer": PRODUCER,
            "kind": _KIND,
            "bundle": place,
            "files": {file: asdict(spec) for file, spec in listed.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def _given(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if value is not None}


def _place(bundle: Path, folder: Path, manifest: Manifest) -> None:
    """The bundle's own files, and no others that lie beside them."""
    folder.mkdir()
    for name in (*manifest.files, MANIFEST):
        source, target = os.path.realpath(bundle / name), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or a file system without hard links
            require_space(folder, Path(source).stat().st_size)
            shutil.copyfile(source, target)


def _require_ours(folder: Path, out: Path) -> None:
    if is_free(folder, out):
        return
    try:
        note = read_json((folder / MANIFEST).read_text(encoding="utf-8"), MANIFEST)
        ours = (note("producer", str), note("kind", str)) == (PRODUCER, _KIND)
        files, place = note.child("files"), note("bundle", str)
        listed = {
            name: FileSpec(files.child(name)("size", int), files.child(name)("sha256", str)) for name in files.data
        }
    except (OSError, UnicodeDecodeError, BundleError):
        ours = False
    if not ours:
        raise OutputError(f"{out}: exists and is no model that `glm4export triton` made; refusing to replace it")
    refuse_strangers(_found_strangers(folder, place, listed), out)


def _found_strangers(folder: Path, place: str, listed: Mapping[str, FileSpec]) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name in (place, MANIFEST) or name.startswith((f"{place}/", f"{_CACHE}/")):
            continue
        if name not in listed:
            found.append(name)
        elif path.stat().st_size != listed[name].size or sha256_of(path) != listed[name].sha256:
            found.append(f"{name} (changed)")
    inside = folder / place
    if inside.is_dir() and not inside.is_symlink():
        try:
            manifest = Manifest.from_json((inside / MANIFEST).read_text(encoding="utf-8"), MANIFEST)
        except (OSError, UnicodeDecodeError, BundleError):
            return [*found, f"{place}/"]
        found += [f"{place}/{name}" for name in strangers(inside, manifest)]
    return found
