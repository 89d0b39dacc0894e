"""Atomic bundles: a build writes into a scratch folder, which replaces the output only once it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from glm4export.bundle.swap import NEW, Check, OutputError, must_stay, roll_back, swap
from glm4runtime import signals
from glm4runtime.contract import MANIFEST, BundleError, Manifest
from glm4runtime.folder.layout import entries, strangers
from glm4runtime.folder.scratch import locked, scratch_folder, sweep

PRODUCER = "glm4export"
_NAMED = 3  # of what is in the way

Snapshot = dict[str, tuple[int, int, int] | None]
Ownership = Callable[[Path, Path], None]  # raises OutputError, about the second, where the first isn't wholly ours


def require_our_bundle(folder: Path, out: Path) -> None:
    """Raise OutputError, about ``out``, where ``folder`` is or holds anything that a bundle of ours doesn't."""
    if is_free(folder, out):
        return
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"), MANIFEST)
    except FileNotFoundError:
        raise OutputError(f"{out}: exists and is not a bundle (no {MANIFEST}); refusing to replace it") from None
    except (BundleError, UnicodeDecodeError) as error:
        reason = str(error).split(";")[0]
        raise OutputError(f"{out}: exists and is not a bundle of ours ({reason}); refusing to replace it") from None
    if manifest.producer != PRODUCER:
        raise OutputError(f"{out}: exists and is a bundle by {manifest.producer!r}; refusing to replace it")
    refuse_strangers(strangers(folder, manifest), out)


def is_free(folder: Path, out: Path) -> bool:
    """Whether nothing is there, or an empty folder. Raises OutputError, about ``out``, where it's no folder."""
    if not os.path.lexists(folder):
        return True
    if not folder.is_dir():
        raise OutputError(f"{out}: exists and is not a folder; choose another name with -o")
    return not entries(folder)


def refuse_strangers(found: list[str], out: Path) -> None:
    """Raise OutputError where a folder that is to be replaced holds what isn't ours."""
    if found:
        raise OutputError(
            f"{out}: refusing to replace what is not as a build left it: {_some(found)}; "
            "move it elsewhere, or choose another folder with -o"
        )


@contextmanager
def new_bundle(out: Path, inputs: Iterable[Path] = (), require_ours: Ownership = require_our_bundle) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, it becomes ``out`` in one step.

    The folder lies beside ``out``, or in it where ``out`` can't be renamed: then its files are replaced one by one, see
    :mod:`glm4export.bundle.swap`. When the block raises, or a signal ends the process, an earlier bundle stays as it
    was and nothing else is left; after SIGKILL the scratch folder stays, and the next build of the same bundle removes
    it. Raises OutputError where ``out`` holds anything that isn't ours, where it and one of the ``inputs`` are or hold
    one another, and where nothing can be written. Another kind of folder with a MANIFEST says itself what is ours.
    """
    out = _resolved(out)
    _require_apart(out, inputs)

    def check(folder: Path) -> None:
        require_ours(folder, out)

    with _scratch(out, check) as scratch, _full_disk_as_error(out):
        yield scratch / NEW
        _swap_in(scratch, out, check)


@contextmanager
def changed_bundle(bundle: Path, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a copy of a bundle, of hard links where they're possible; when the block ends well, it takes its place.

    Whatever the folder holds is kept, the user's own files too. A file that is to change must be removed first: written
    into, it would change in both places. Otherwise as :func:`new_bundle`; OutputError too where the bundle was changed
    meanwhile.
    """
    bundle = _resolved(bundle)
    _require_apart(bundle, inputs)
    before = _snapshot(bundle)

    def check(folder: Path) -> None:
        found = _snapshot(folder)
        if changed := sorted(name for name in found.keys() | before.keys() if found.get(name) != before.get(name)):
            raise OutputError(f"{bundle}: was changed meanwhile ({_some(changed)}); run the command again")

    with _scratch(bundle, check) as scratch, _full_disk_as_error(bundle):
        link_bundle(bundle, scratch / NEW)
        yield scratch / NEW
        _swap_in(scratch, bundle, check)


def check_output(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise the OutputError that :func:`new_bundle` would, before anything is downloaded or read; leaves nothing."""
    out = _resolved(out)
    _require_apart(out, inputs)
    with _scratch(out, lambda folder: require_our_bundle(folder, out)):
        pass


def link_bundle(bundle: Path, folder: Path) -> None:
    """Fill the empty ``folder`` with what ``bundle`` holds, as hard links where they're possible, links as links."""
    for name in entries(bundle):
        if (bundle / name).is_dir() and not (bundle / name).is_symlink():
            shutil.copytree(bundle / name, folder / name, symlinks=True, copy_function=_link)
        else:
            _link(str(bundle / name), str(folder / name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def require_space(folder: Path, size: int) -> None:
    """Raise OutputError when the disk under ``folder`` has less than ``size`` bytes free: now, not in an hour."""
    free = shutil.disk_usage(folder).free
    if free < size:
        disk = next(path for path in (folder, *folder.resolve().parents) if path.is_mount())
        raise OutputError(
            f"{disk}: the bundle needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another disk with -o"
        )


@contextmanager
def _scratch(out: Path, check: Check) -> Iterator[Path]:
    """A scratch folder for ``out``, in a place from where it can be moved there; what killed builds left is gone."""
    with ExitStack() as stack:
        with _refused_as_error(out):
            place = out if must_stay(out) else out.parent
            _make_folders(place, stack)
            with _locks(place, out):
                for swept in {place, out} if out.is_dir() else {place}:
                    sweep(swept, _prefix(out), rescue=lambda folder: roll_back(folder, out))
                check(out)
                scratch = stack.enter_context(scratch_folder(place, _prefix(out)))
            (scratch / NEW).mkdir()
        yield scratch


def _swap_in(scratch: Path, out: Path, check: Check) -> None:
    with _refused_as_error(out), _locks(scratch.parent, out):
        check(out)  # again: a build takes long enough for something else to have got there
        with signals.held():
            swap(scratch, out, check)


def _resolved(out: Path) -> Path:
    """The path behind links, so that a link stays one."""
    with _refused_as_error(out):
        real = Path(os.path.realpath(out))
        if real.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return real


def _require_apart(out: Path, inputs: Iterable[Path]) -> None:
    for given in inputs:
        links = [path for path in given.iterdir() if path.is_symlink()] if given.is_dir() else []
        for path in (given, *links):  # a checkpoint's files may be links to anywhere
            real = Path(os.path.realpath(path))
            if real == out:
                how = f"is the input {path} itself"
            elif out in real.parents:
                how = f"holds the input {path}"
            elif real in out.parents and real.is_dir():
                how = f"lies in the input {path}"
            else:
                continue
            raise OutputError(f"{out}: {how}; the output must lie apart from it, choose another folder")


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _snapshot(folder: Path) -> Snapshot:
    """What tells the files in a folder from others, by name; None for folders."""
    found: Snapshot = {}
    for name in entries(folder):
        inside = () if (folder / name).is_symlink() else (folder / name).rglob("*")
        for path in (folder / name, *inside):
            state = path.lstat()
            same = None if path.is_dir() and not path.is_symlink() else (state.st_ino, state.st_size, state.st_mtime_ns)
            found[str(path.relative_to(folder))] = same
    return found


def _make_folders(place: Path, stack: ExitStack) -> None:
    """Make a folder and its parents; those that are still empty at the end go away again."""
    missing = [path for path in (place, *place.parents) if not path.exists()]

    def remove() -> None:
        with suppress(OSError):
            for path in missing:
                path.rmdir()

    with signals.held():
        stack.enter_context(signals.undone(remove))
        stack.callback(remove)
        place.mkdir(parents=True, exist_ok=True)


@contextmanager
def _locks(place: Path, out: Path) -> Iterator[None]:
    """Of the folder that ``out`` lies in, and of ``out``, which ``prepare`` holds while it works in it."""
    with ExitStack() as stack:
        for folder in dict.fromkeys((place, out)):
            if folder.is_dir():
                stack.enter_context(locked(folder, "another build or prepare"))
        yield


@contextmanager
def _refused_as_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); choose another folder with -o") from None


@contextmanager
def _full_disk_as_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{out}: {error.strerror}; free some space or choose another disk with -o") from None
        raise


def _prefix(out: Path) -> str:
    return f".{out.name}.build-"
