"""Atomic bundles: a build writes into a hidden sibling folder that takes the bundle's place only when it's complete."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm4runtime.contract import MANIFEST, WEIGHTS, UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_ASIDE = "-old"


class OutputError(UserError):
    """An output folder that can't be written or must not be replaced."""


@contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out``; when the block ends well, it becomes ``out`` in one step.

    When the block raises, the folder is removed and an earlier bundle stays as it was. When the process is killed, the
    folder stays behind, unlocked, and the next build of the same bundle removes it. Raises OutputError where ``out``
    isn't a bundle that may be replaced, or nothing can be written there.
    """
    out = Path(os.path.realpath(out))  # through a link, so that the link stays one
    with _refused_as_error(out):
        _check_replaceable(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.parent):  # so that no other build takes a folder for stale before it's locked
            _sweep(out)
            folder = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
            lock = _lock(folder)
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        with _refused_as_error(out), _locked(out.parent):
            _check_replaceable(out)  # again: a build takes long enough for something else to have got there
            _replace(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{out}: {error.strerror}; free some space or choose another disk with -o") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after the exchange this name holds the earlier bundle
        os.close(lock)


def link_bundle(bundle: Path, folder: Path) -> None:
    """Fill the empty ``folder`` of :func:`new_bundle` with what ``bundle`` holds, as hard links where they're possible.

    A file that is to change must be removed first: written into, it would change in both places.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target)

    shutil.copytree(bundle, folder, copy_function=link, dirs_exist_ok=True)


def require_space(folder: Path, size: int) -> None:
    """Raise OutputError when the disk under ``folder`` has less than ``size`` bytes free: now, not in an hour."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"{folder.parent}: the bundle needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another disk with -o"
        )


@contextmanager
def _refused_as_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); choose another folder with -o") from None


def _check_replaceable(out: Path) -> None:
    if out.is_dir():
        missing = [name for name in (MANIFEST, WEIGHTS) if not (out / name).is_file()]
        if missing and any(out.iterdir()):
            raise OutputError(f"{out}: exists and is not a bundle (no {missing[0]}); refusing to replace it")
    elif out.exists():
        raise OutputError(f"{out}: exists and is not a folder; choose another name with -o")


def _replace(folder: Path, out: Path) -> None:
    """Put ``folder`` in the place of ``out``; an earlier bundle ends up under ``folder``'s name."""
    if not out.exists():
        folder.rename(out)
    elif not _exchange(folder, out):  # a file system without the atomic swap: for a moment there's none
        aside = folder.with_name(folder.name + _ASIDE)
        out.rename(aside)
        folder.rename(out)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically with Linux's renameat2; False where kernel or file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(_AT_FDCWD, bytes(first), _AT_FDCWD, bytes(second), _RENAME_EXCHANGE) == 0)


def _prefix(out: Path) -> str:
    return f".{out.name}.build-"


def _sweep(out: Path) -> None:
    """Remove what killed builds of the same bundle left; a live build holds its folder's lock."""
    for folder in out.parent.glob(f"{glob.escape(_prefix(out))}*"):
        if folder.name.endswith(_ASIDE) and not out.exists():  # killed between the two renames of _replace
            folder.rename(out)
            continue
        try:
            os.close(_lock(folder))
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int:
    """Open a folder and take its lock without waiting; OSError where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
