"""A folder that can't be renamed (a mount point, a parent that is read-only): its files are replaced one by one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glm4export.bundle import folder as bundle_folder
from glm4export.bundle import swap
from glm4export.bundle.folder import changed_bundle, check_output, new_bundle
from glm4export.bundle.swap import OutputError
from glm4runtime import signals
from glm4runtime.contract import MANIFEST, WEIGHTS
from glm4runtime.folder import scratch
from glm4runtime.folder.layout import entries
from glm4runtime.folder.scratch import MARKER
from tests.helpers.small_bundles import Contents, bundle_names, contents, fill, names


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for a mount point."""
    (tmp_path / "bundle").mkdir()
    monkeypatch.setattr(bundle_folder, "must_stay", lambda folder: True)
    return tmp_path / "bundle"


def test_a_new_bundle_in_an_empty_folder(out: Path) -> None:
    before = out.stat().st_ino
    with new_bundle(out) as folder:
        assert folder.parents[1] == out  # on its disk
        fill(folder, "new")
        assert [name for name in names(out) if not name.startswith(".")] == []
    assert names(out) == bundle_names("new") and out.stat().st_ino == before and names(out.parent) == ["bundle"]


def test_an_earlier_bundle_is_replaced(out: Path) -> None:
    fill(out, "old", "engines/old.engine")
    before = out.stat().st_ino
    with new_bundle(out) as folder:
        fill(folder, "new", "engines/new.engine")
        assert (out / MANIFEST).is_file()
    assert names(out) == sorted([*bundle_names("new"), "engines"]) and names(out / "engines") == ["new.engine"]
    assert out.stat().st_ino == before


def test_a_bundle_that_is_changed_where_it_lies(out: Path) -> None:
    fill(out)
    (out / "NOTES.md").write_text("mine")
    before = contents(out)
    with changed_bundle(out) as folder:
        assert contents(folder) == before
        (folder / "new").write_text("new")
    assert contents(out) == {**before, "new": b"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_the_earlier_bundle(error: BaseException | type[BaseException], out: Path) -> None:
    fill(out, "old")
    before = contents(out)
    with pytest.raises((KeyboardInterrupt, OutputError)), new_bundle(out) as folder:
        fill(folder, "new")
        raise error
    assert contents(out) == before


class Killed(BaseException):
    pass


def moves(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """Let the move of that index fail; returns the names that were moved before."""
    moved: list[str] = []
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if len(moved) == at:
            moved.append("")
            raise error
        moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    return moved


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], list[str]]:
    """A build that is killed at one of the swap's moves: nothing runs that would clean up."""

    def kill(out: Path, at: int) -> list[str]:
        with monkeypatch.context() as patched:
            patched.setattr(swap, "roll_back", lambda folder, out: None)
            patched.setattr(scratch, "remove", lambda folder: None)
            moved = moves(patched, at, Killed())
            with pytest.raises(Killed), new_bundle(out) as folder:
                fill(folder, "new")
        return moved

    return kill


OLD, NEW = 5, 5  # files in either bundle


@pytest.mark.parametrize("at", range(OLD + NEW))
def test_a_kill_at_any_move_is_mended_by_the_next_build(
    at: int, out: Path, killed: Callable[[Path, int], list[str]]
) -> None:
    fill(out, "old")
    before = contents(out)
    moved = killed(out, at)[:-1]
    if moved:  # the manifest goes first and comes last: never is a mixture read as a bundle
        assert moved[0] == MANIFEST and MANIFEST not in moved[1:] and not (out / MANIFEST).exists()
    check_output(out)  # as the next build begins
    assert contents(out) == before and names(out.parent) == ["bundle"]
    with new_bundle(out) as folder:
        fill(folder, "newer")
    assert names(out) == bundle_names("newer")


@pytest.mark.parametrize("at", [0, 3])
def test_a_kill_where_there_was_no_bundle(at: int, out: Path, killed: Callable[[Path, int], list[str]]) -> None:
    killed(out, at)
    check_output(out)
    assert names(out) == []


def test_a_kill_behind_the_last_move_leaves_the_new_bundle(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    with monkeypatch.context() as patched:
        patched.setattr(scratch, "remove", lambda folder: None)
        with new_bundle(out) as folder:
            fill(folder, "new")
    left = [name for name in names(out) if name.startswith(".")]
    assert len(left) == 1 and (out / left[0] / "earlier" / "old").is_file()
    check_output(out)
    assert names(out) == bundle_names("new")


def test_what_was_put_into_the_way_is_named_and_stays(out: Path, killed: Callable[[Path, int], list[str]]) -> None:
    fill(out, "old")
    killed(out, OLD)
    (out / "old").write_text("mine")
    with pytest.raises(OutputError, match=rf"{out}/old: is in the way of {out}/.*/earlier/old; move it elsewhere"):
        check_output(out)
    (out / "old").rename(out.parent / "old")
    check_output(out)
    assert names(out) == bundle_names("old") and (out.parent / "old").read_text() == "mine"


@pytest.mark.parametrize("at", range(OLD + NEW))
def test_a_disk_that_fails_at_any_move(at: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    before = contents(out)
    with monkeypatch.context() as patched:
        moves(patched, at, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OutputError, match=r"cannot be written \(Input/output error\)"), new_bundle(out) as folder:
            fill(folder, "new")
    assert contents(out) == before


def test_what_cannot_be_put_back_is_kept_and_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "old")
    before = contents(out)
    rename, count = Path.rename, 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(OutputError, match="was half replaced") as caught, new_bundle(out) as folder:
            fill(folder, "new")
    earlier = Path(str(caught.value).split(" is in ")[1])
    kept = contents(earlier)
    assert {MANIFEST} <= kept.keys() and {**contents(out), **kept}.items() >= before.items()
    with pytest.raises(OutputError, match=r"exists and is not a bundle \(no manifest.json\)"):
        check_output(out)
    assert contents(earlier) == kept


def test_a_signal_amid_the_swap_waits_for_its_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it raises, so that a test can see it."""
    fill(out, "old")

    def entries_and_signal(folder: Path) -> list[str]:
        signals._on_signal(signal.SIGINT, None)
        return entries(folder)

    monkeypatch.setattr(swap, "entries", entries_and_signal)
    with pytest.raises(KeyboardInterrupt), signals.raised(), new_bundle(out) as folder:
        fill(folder, "new")
    assert names(out) == bundle_names("new")


# Where it is known that a folder must stay


def test_the_working_directory_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell goes on in a folder that was exchanged, under no name, and sees nothing of the bundle."""
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    before = (tmp_path / "here").stat().st_ino
    with pytest.raises(OutputError, match=r"here: exists and is not a bundle"):
        check_output(Path())
    (tmp_path / "here" / "sub").rmdir()
    with new_bundle(Path()) as folder:
        fill(folder, "new")
    assert names(Path()) == bundle_names("new") and (tmp_path / "here").stat().st_ino == before


@pytest.mark.parametrize("reason", ["a mount in mountinfo", "a parent that cannot be written", "a sticky parent"])
def test_folders_that_must_stay(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a b\\c"
    out.mkdir()
    assert not swap.must_stay(out) and not swap.must_stay(tmp_path / "none")
    if reason == "a mount in mountinfo":
        escaped = str(out).replace("\\", r"\134").replace(" ", r"\040")
        line = f"36 35 98:0 /mnt1 {escaped} rw,noatime master:1 - ext3 /dev/root rw"
        monkeypatch.setattr(Path, "read_bytes", lambda path: line.encode())
    elif reason == "a parent that cannot be written":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    else:
        tmp_path.chmod(0o1777)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert swap.must_stay(out)


@pytest.fixture
def disk(small_disk: Callable[[int], Path]) -> Iterator[Path]:
    yield small_disk(1 << 20)


def test_a_real_mount_point(disk: Path, tmp_path: Path) -> None:
    """A container's volume; a new ext4 has its lost+found."""
    (disk / "lost+found").mkdir()
    mounted: list[Contents] = []
    for name in ("first", "second"):
        with new_bundle(disk) as folder:
            assert folder.stat().st_dev == disk.stat().st_dev != tmp_path.stat().st_dev
            fill(folder, name)
        assert names(disk) == sorted([*bundle_names(name), "lost+found"])
        mounted.append(contents(disk))
    (disk / "NOTES.md").write_text("mine")
    with pytest.raises(OutputError, match=r"disk: refusing to replace what is not as a build left it: NOTES\.md;"):
        check_output(disk)
    assert contents(disk) == {**mounted[1], "NOTES.md": b"mine"} and names(tmp_path) == ["disk"]


def test_a_folder_mounted_from_the_same_disk(tmp_path: Path) -> None:
    """It has its parent's device number: only the kernel's table of mounts tells."""
    volume, out = tmp_path / "volume", tmp_path / "bundle"
    volume.mkdir()
    out.mkdir()
    mount = ["mount", "--bind", volume, out]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a folder is not permitted here")
    try:
        with new_bundle(out) as folder:
            fill(folder, "new")
        assert names(volume) == bundle_names("new")
    finally:
        subprocess.run(["umount", out], check=True)


def test_space_is_asked_of_the_mounted_disk(disk: Path) -> None:
    with (
        pytest.raises(OutputError, match=rf"^{disk}: the bundle needs 0\.01 GB, the disk has 0\.00 GB free"),
        new_bundle(disk) as folder,
    ):
        bundle_folder.require_space(folder, 10_000_000)
    assert names(disk) == []


def test_a_mounted_disk_that_runs_full(disk: Path) -> None:
    fill(disk, "old")
    before = contents(disk)
    with pytest.raises(OutputError, match=rf"{disk}: No space left on device"), new_bundle(disk) as folder:
        (folder / WEIGHTS).write_bytes(bytes(2 << 20))
    assert contents(disk) == before and not list(disk.glob(f".*/{MARKER}"))
