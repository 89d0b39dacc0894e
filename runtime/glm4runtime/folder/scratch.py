"""Folders of unfinished work: marked as ours, locked while in use, and removed later when a kill left them.

A user's folder may have any name, also one that ours have. So a name is never enough to remove a folder: its marker is
what makes it ours. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from glm4runtime import signals

MARKER = ".glm4export-scratch"
_TEXT = b"A scratch folder of glm4export. The command that was killed here removes it when it runs again.\n"
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # EBADF: NFS, which can't lock folders
_TRIES = 5


@contextmanager
def scratch_folder(place: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``place`` that holds nothing but its marker, locked for as long as the block runs.

    Removed with all it holds when the block ends or a signal ends the process. What is to stay is moved out by then.
    """
    with ExitStack() as stack:
        with signals.held():
            folder, lock = _make(place, prefix)
            stack.callback(os.close, lock)
            stack.enter_context(signals.undone(lambda: remove(folder)))
            stack.callback(remove, folder)
        yield folder


def sweep(place: Path, prefix: str, rescue: Callable[[Path], None] = lambda folder: None) -> None:
    """Remove the scratch folders that killed processes left in ``place``; those in use are locked.

    ``rescue`` is called before with each, and takes out of it what must not be lost.
    To be called, and a new folder to be made, under a lock of ``place``: so that a new one isn't taken for left.
    """
    for folder in sorted(place.iterdir()):
        if not folder.name.startswith(prefix) or not _is_ours(folder):
            continue
        try:
            lock = _open_locked(folder)
        except OSError:  # in use, or on a file system that can't say
            continue
        try:
            rescue(folder)
            remove(folder)
        finally:
            os.close(lock)


def is_scratch(folder: Path) -> bool:
    """Whether a folder is marked as ours."""
    try:
        return not folder.is_symlink() and (folder / MARKER).read_bytes() == _TEXT
    except OSError:
        return False


def names_in(folder: Path) -> list[str]:
    """The names of what a folder holds, sorted."""
    return sorted(path.name for path in folder.iterdir())


def _is_ours(folder: Path) -> bool:
    """Also one that a kill left while it was made: empty, or with half a marker, so that nothing can be lost."""
    with suppress(OSError):
        if folder.is_symlink() or names_in(folder) not in ([], [MARKER]):
            return is_scratch(folder)
        return not names_in(folder) or _TEXT.startswith((folder / MARKER).read_bytes())
    return False


def remove(folder: Path) -> None:
    """Remove a scratch folder, its marker last, so that a kill halfway leaves it marked. One without marker is kept."""
    if not _is_ours(folder):
        return
    for _ in range(_TRIES):  # a thread that is still at work may put a file into it meanwhile
        with suppress(OSError):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != MARKER:
                    path.unlink()
        with suppress(OSError):
            if names_in(folder) == [MARKER]:
                (folder / MARKER).unlink()
            folder.rmdir()
            return


@contextmanager
def locked(folder: Path, what: str) -> Iterator[bool]:
    """Hold a folder's lock; yields whether that took a wait, which is said on standard error: "waiting for ``what``".

    Where the file system knows no locks there is none, and at most a folder in use is not known as such.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    waited = False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            with suppress(OSError):  # nobody may be there to read it
                print(f"glm4export: waiting for {what} ({folder} is locked)", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield waited
    finally:
        os.close(descriptor)


def _make(place: Path, prefix: str) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks: no other process will take it for left, see sweep
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / MARKER).write_bytes(_TEXT)
    except BaseException:  # a full disk
        os.close(descriptor)
        remove(folder)
        raise
    return folder, descriptor


def _open_locked(folder: Path) -> int:
    """Open a folder and take its lock without waiting; OSError where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
