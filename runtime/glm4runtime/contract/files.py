"""A bundle's files: whether each is there, inside the bundle, and as its manifest says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from glm4runtime.contract.errors import BundleError
from glm4runtime.contract.names import CHAT_TEMPLATE, MANIFEST, TOKENIZER_CONFIG

_WITH_TEMPLATE = (CHAT_TEMPLATE, TOKENIZER_CONFIG)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SHA256, SHA256_WORDS = "[0-9a-f]{64}", "64 hexadecimal digits"
_HASH_BLOCK = 1 << 22  # bytes read at a time while hashing


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    size: int
    sha256: str


def check_file(folder: Path, name: str, spec: FileSpec, *, check_hashes: bool, by: str = "the manifest") -> None:
    """Raise BundleError unless a bundle's file is there, inside the bundle, and as ``spec`` says.

    by: what says so. Its sha256 is only compared with ``check_hashes``, which reads the whole file.
    """
    file = folder / name
    try:
        # Hub caches have links for files, into one store: where manifest.json leads, the others may.
        homes = folder.resolve(), (folder / MANIFEST).resolve().parent
        if not file.is_file():
            raise BundleError(f"{file}: missing; {by} lists it. Build the bundle again or copy it whole")
        real, size = file.resolve(), file.stat().st_size
        if not any(real.is_relative_to(home) for home in homes):
            raise BundleError(f"{file}: a link to {real}, which is outside of the bundle; copy that file into it")
        if size != spec.size:
            with file.open("rb") as opened:
                refuse_pointer(opened.read(len(_LFS_POINTER)), str(file))
            raise BundleError(
                f"{file}: {size} bytes, {by} says {spec.size}; copy or build the bundle again{_hint(name)}"
            )
        if check_hashes and (found := sha256_of(file)) != spec.sha256:
            raise BundleError(f"{file}: sha256 {found}, {by} says {spec.sha256}; the file was changed{_hint(name)}")
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror})") from None


def refuse_pointer(start: bytes, name: str) -> None:
    """Raise BundleError where ``start``, of a file called ``name``, is what git has in the place of a large file."""
    if start.startswith(_LFS_POINTER):
        raise BundleError(
            f"{name}: a git-lfs pointer, not the file; run `git lfs pull` in the folder that was cloned, and if that "
            "was the checkpoint's, build the bundle again"
        )


def _hint(name: str) -> str:
    """A hint for a file that differs from the built one: templates are often changed on purpose."""
    if name not in _WITH_TEMPLATE:
        return ""
    return (
        ". To chat with another template, leave it as it was: load(..., chat_template=...), or generate --chat-template"
    )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
