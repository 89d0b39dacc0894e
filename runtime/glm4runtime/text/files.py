"""Tokenizer and template files, read together when a bundle is opened, so that a later change can't mix two bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glm4runtime.contract import TEXT_FILES, BundleError, refuse_pointer


def read_text_files(folder: Path) -> dict[str, bytes]:
    """Those that are there, by name; what they hold is checked on use. Raises BundleError where one can't be read."""
    files = {}
    for name in TEXT_FILES:
        path = folder / name
        try:
            if path.is_file():
                files[name] = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: can't be read: {error}") from error
    return files


def text_of(files: Mapping[str, bytes], name: str, folder: Path) -> str:
    """A file's content. Raises BundleError where it is a git-lfs pointer, or not UTF-8."""
    refuse_pointer(files[name], str(folder / name))
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{folder / name}: can't be read: {error}") from error
