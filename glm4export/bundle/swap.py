"""Put a finished bundle in the place of an earlier one: in one step, or file by file where the folder can't be renamed.

Both lie in a scratch folder on the way: ``new`` holds the finished bundle, ``earlier`` what was there before.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from glm4runtime.contract import MANIFEST, UserError
from glm4runtime.folder.layout import entries
from glm4runtime.folder.scratch import MARKER, names_in

NEW = "new"
_EARLIER = "earlier"
_NAMES = "names.json"  # what is in NEW before anything is moved
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

Check = Callable[[Path], None]  # raises where a folder holds what may not be removed


class OutputError(UserError):
    """An output folder that can't be written or must not be replaced."""


def swap(scratch: Path, out: Path, check: Check) -> None:
    """Make ``scratch``'s new bundle ``out``. What was there is checked once more where nobody adds to it any longer,
    and is put back when ``check`` raises; else it is left in ``scratch``, to be removed with it.
    """
    new = scratch / NEW
    if not out.exists():
        new.rename(out)
    elif scratch.parent != out and exchange(new, out):
        try:
            check(new)
        except BaseException:
            exchange(new, out)
            raise
    else:
        _by_files(scratch, out, check)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically with Linux's renameat2; False where kernel or file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(_AT_FDCWD, bytes(first), _AT_FDCWD, bytes(second), _RENAME_EXCHANGE) == 0)


def must_stay(out: Path) -> bool:
    """Whether a folder can't be renamed, or must not be, so that only what is in it can be replaced.

    That is a mount point (a container's volume), a folder whose parent can't be written, and the working directory,
    which a shell would go on holding under no name.
    """
    if not out.is_dir():
        return False
    with suppress(FileNotFoundError):  # the working directory may be gone
        if out in (Path.cwd(), *Path.cwd().parents):
            return True
    parent = out.parent.stat()
    sticky = parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, parent.st_uid, out.stat().st_uid)
    return out.is_mount() or out in _mount_points() or not os.access(out.parent, os.W_OK | os.X_OK) or bool(sticky)


def _mount_points() -> set[Path]:
    """As the kernel has them: a folder of the same disk, mounted, is told by nothing else."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    escaped = (line.split(b" ")[4] for line in lines)
    paths = (re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path) for path in escaped)
    return {Path(os.fsdecode(path)) for path in paths}


def _by_files(scratch: Path, out: Path, check: Check) -> None:
    """Move the earlier bundle's entries out and the new one's in: the manifest first out, and last in.

    So at no moment does a mixture read as a bundle: a kill leaves ``out`` without a manifest, and the scratch folder
    with all that :func:`roll_back` needs to put the earlier bundle back, as the next build does. Only the moment after
    the last move is another: there the new bundle is whole.
    """
    new, earlier = scratch / NEW, scratch / _EARLIER
    assert (new / MANIFEST).is_file()
    (scratch / _NAMES).write_text(json.dumps(names_in(new)), encoding="utf-8")
    earlier.mkdir()
    try:
        _move(_manifest_last(entries(out))[::-1], out, earlier)
        check(earlier)
        _move(_manifest_last(names_in(new)), new, out)
    except BaseException:
        try:
            roll_back(scratch, out)
        except (OSError, OutputError) as error:
            with suppress(OSError):
                (scratch / MARKER).unlink()  # so that it stays
            raise OutputError(f"{out}: was half replaced ({error}); what it held before is in {earlier}") from None
        raise


def roll_back(scratch: Path, out: Path) -> None:
    """Undo what a kill left half done in :func:`_by_files`. Raises OutputError where something got into the way."""
    new, earlier = scratch / NEW, scratch / _EARLIER
    if not earlier.is_dir() or not (new / MANIFEST).is_file():  # nothing was moved, or all of it
        return
    moved = set(json.loads((scratch / _NAMES).read_text(encoding="utf-8"))) - set(names_in(new))
    _move((name for name in moved if os.path.lexists(out / name)), out, new)
    _move(_manifest_last(names_in(earlier)), earlier, out)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if os.path.lexists(target / name):
            raise OutputError(f"{target / name}: is in the way of {source / name}; move it elsewhere and run again")
        (source / name).rename(target / name)


def _manifest_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == MANIFEST, name))
