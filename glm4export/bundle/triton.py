"""A bundle as a model in a repository of NVIDIA's Triton Inference Server: REPOSITORY/NAME, replaced in one step.

Causal language models have the bundle in ``1/bundle`` beside the Python that runs it, and what goes with it in
``1/draft`` and ``1/adapters``; others are ``1`` itself, which Triton's ONNX Runtime reads. ``manifest.json`` names the
bundles, and lists what is ours beside them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
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
    bundle: Path,
    repository: Path,
    name: str,
    settings: Mapping[str, object],
    *,
    slots: int,
    link: bool = False,
    adapters: Mapping[str, Path] | None = None,
    draft: Path | None = None,
) -> Path:
    """Make the model's folder in the repository, or put it in the place of an earlier one; returns it.

    settings: further arguments of ``Engine.load``, and ``drain``, for language models only; None is the default. slots:
    theirs too; of others the most rows in a run. link: a symbolic link to the bundle instead of its files. Those are
    hard links where they're possible, and copies elsewhere: the folder can be moved alone. adapters: files by the names
    that requests have for them. draft: another bundle, placed as the first.

    Raises UserError for a name or a bundle that doesn't do, OutputError as :func:`glm4export.bundle.folder.new_bundle`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: expected letters, digits, _, . and -, as Triton's addresses have them")
    manifest, files = read_manifest(bundle), dict(adapters or {})
    if manifest.target == TENSORRT:
        raise UserError(f"{bundle}: built for tensorrt; a repository takes bundles for cpu and cuda, build it for one")
    given = {key: value for key, value in settings.items() if value is not None}
    bundles, beside = {f"{_VERSION}/bundle": bundle}, {}
    if manifest.task == CAUSAL_LM:
        if draft is not None:
            _require_draft(draft, manifest)
            bundles[f"{_VERSION}/draft"], given["draft"] = draft, "draft"
        if files:
            given["adapters"] = {key: f"adapters/{number}" for number, key in enumerate(files)}
            beside = {f"{_VERSION}/adapters/{number}": file for number, file in enumerate(files.values())}
        _require_positions(bundle, manifest, given.get("max_seq_len"))
        config = engine_config(name, {**_DEFAULTS, **given, "slots": slots})
        beside |= {f"{_VERSION}/{file}": Path(backend.__path__[0]) / file for file in _PYTHON}
    elif given or files or draft is not None:
        names = sorted([*given, *(["adapters"] if files else []), *(["draft"] if draft is not None else [])])
        raise UserError(f"{bundle}: a bundle for {manifest.task}, which has no engine: leave out {', '.join(names)}")
    else:
        bundles, config = {_VERSION: bundle}, encoder_config(name, manifest, slots)
    out = repository / name
    with new_bundle(out, [*bundles.values(), *files.values()], _require_ours) as folder:
        for place, source in bundles.items():
            (folder / place).parent.mkdir(exist_ok=True)
            if link:
                (folder / place).symlink_to(source.resolve(), target_is_directory=True)
            else:
                _place(source, folder / place)
        (folder / CONFIG).write_text(config, encoding="utf-8")
        for target, source in beside.items():
            (folder / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / target)
        listed = {
            file: FileSpec((folder / file).stat().st_size, sha256_of(folder / file)) for file in (CONFIG, *beside)
        }
        note = {
            "producer": PRODUCER,
            "kind": _KIND,
            "bundles": list(bundles),
            "files": {file: asdict(spec) for file, spec in listed.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def _require_draft(draft: Path, manifest: Manifest) -> None:
    """Told now what Triton's log would say: tokenizers themselves are compared when the engine is opened."""
    found = read_manifest(draft)
    if found.task != CAUSAL_LM or found.vocab_size != manifest.vocab_size:
        raise UserError(
            f"--draft {draft}: a bundle for {found.task} with {found.vocab_size} tokens; expected {CAUSAL_LM} with "
            f"{manifest.vocab_size}, a smaller model of the same family"
        )


def _require_positions(bundle: Path, manifest: Manifest, asked: object) -> None:
    most = manifest.cache.max_seq_len
    if isinstance(asked, int) and asked > most:
        raise UserError(f"--max-seq-len {asked}: {bundle} was built for {most} positions")


def _place(bundle: Path, folder: Path) -> None:
    """The bundle's own files, and no others that lie beside them."""
    folder.mkdir()
    for name in (*read_manifest(bundle).files, MANIFEST):
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
        files, places = note.child("files"), [str(place) for place in note("bundles", list)]
        listed = {
            name: FileSpec(files.child(name)("size", int), files.child(name)("sha256", str)) for name in files.data
        }
    except (OSError, UnicodeDecodeError, BundleError):
        ours = False
    if not ours:
        raise OutputError(f"{out}: exists and is no model that `glm4export triton` made; refusing to replace it")
    refuse_strangers(_found_strangers(folder, places, listed), out)


def _found_strangers(folder: Path, places: Sequence[str], listed: Mapping[str, FileSpec]) -> list[str]:
    found, inside = [], tuple(f"{place}/" for place in (*places, _CACHE))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name in (*places, MANIFEST) or name.startswith(inside):
            continue
        if name not in listed:
            found.append(name)
        elif path.stat().st_size != listed[name].size or sha256_of(path) != listed[name].sha256:
            found.append(f"{name} (changed)")
    for place in places:
        bundle = folder / place
        if bundle.is_dir() and not bundle.is_symlink():
            try:
                manifest = Manifest.from_json((bundle / MANIFEST).read_text(encoding="utf-8"), MANIFEST)
            except (OSError, UnicodeDecodeError, BundleError):
                found.append(f"{place}/")
            else:
                found += [f"{place}/{name}" for name in strangers(bundle, manifest)]
    return found
