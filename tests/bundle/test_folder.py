"""A bundle appears whole or not at all: success, failure, kills, signals, full disks, builds at the same time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glm4export.bundle import swap
from glm4export.bundle.folder import new_bundle, require_space
from glm4export.bundle.swap import OutputError
from glm4runtime.contract import MANIFEST, WEIGHTS, read_manifest
from glm4runtime.folder import scratch
from glm4runtime.folder.scratch import MARKER
from tests.helpers import checkpoints
from tests.helpers.small_bundles import Contents, bundle_names, contents, fill, names

Pair = tuple[Contents, Contents]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def test_a_new_bundle_appears_at_the_end(out: Path) -> None:
    with new_bundle(out) as folder:
        assert folder.parents[1] == out.parent and names(folder) == []
        fill(folder, "new")
        assert not out.exists()
    assert names(out) == bundle_names("new") and names(out.parent) == ["bundle"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_bundle(tmp_path / "a" / "b" / "bundle"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []  # and go with what failed
    with new_bundle(tmp_path / "a" / "b" / "bundle") as folder:
        fill(folder, "new")
    assert names(tmp_path / "a" / "b") == ["bundle"] and names(tmp_path / "a" / "b" / "bundle") == bundle_names("new")


@pytest.mark.parametrize("atomic", [True, False], ids=["renameat2", "no renameat2"])
def test_an_earlier_bundle_is_replaced(atomic: bool, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not atomic:
        monkeypatch.setattr(swap, "exchange", lambda first, second: False)
    fill(out, "old")
    with new_bundle(out) as folder:
        fill(folder, "new")
        assert (out / "old").is_file()
    assert names(out) == bundle_names("new") and names(out.parent) == ["bundle"]


def test_the_swap_is_atomic_here(out: Path) -> None:
    """The machine that tests has renameat2, so that the tests above and below run it."""
    fill(out, "old")
    fill(out.with_name("other"), "new")
    assert swap.exchange(out, out.with_name("other"))
    assert (out / "new").is_file() and (out.with_name("other") / "old").is_file()
    assert not swap.exchange(out, out.with_name("nowhere"))


def test_an_empty_folder_is_replaced(out: Path) -> None:
    out.mkdir()
    with new_bundle(out) as folder:
        fill(folder, "new")
    assert names(out) == bundle_names("new") and names(out.parent) == ["bundle"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["notes.txt"], r"no manifest.json"),
        ([WEIGHTS], r"no manifest.json"),
        ([MANIFEST, "icon.png"], r"manifest.json: not valid JSON \(Expecting value: .*\)"),
        ([MANIFEST, WEIGHTS], r"manifest.json: not valid JSON \(Expecting value: .*\)"),
    ],
)
def test_a_folder_that_is_no_bundle_is_kept(files: list[str], reason: str, out: Path) -> None:
    out.mkdir()
    for name in files:
        (out / name).write_text("mine")
    with (
        pytest.raises(OutputError, match=rf"{out}: exists and is not a bundle.* \({reason}\); refusing to replace it"),
        new_bundle(out),
    ):
        pytest.fail("not reached")
    assert names(out) == sorted(files) and names(out.parent) == ["bundle"]


def test_a_file_is_kept(out: Path) -> None:
    out.write_text("mine")
    with (
        pytest.raises(OutputError, match=rf"{out}: exists and is not a folder; choose another name with -o"),
        new_bundle(out),
    ):
        pytest.fail("not reached")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("made", ["folder", "file"])
def test_what_appears_during_the_build_is_kept(made: str, out: Path) -> None:
    with pytest.raises(OutputError, match=rf"{out}: exists and is not a"), new_bundle(out) as folder:
        fill(folder, "new")
        if made == "folder":
            out.mkdir()
        (out / "notes.txt" if made == "folder" else out).write_text("mine")
    assert names(out.parent) == ["bundle"]
    assert (out / "notes.txt" if made == "folder" else out).read_text() == "mine"


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_a_failure_leaves_nothing(error: type[BaseException], earlier: bool, out: Path) -> None:
    if earlier:
        fill(out, "old")
    with pytest.raises(error), new_bundle(out) as folder:
        fill(folder, "new")
        (folder / "sub").mkdir()
        raise error
    assert names(out.parent) == (["bundle"] if earlier else [])
    assert not earlier or names(out) == bundle_names("old")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_in_one_line(number: int, out: Path) -> None:
    text = os.strerror(number)
    with (
        pytest.raises(OutputError, match=rf"{out}: {text}; free some space or choose another disk with -o"),
        new_bundle(out),
    ):
        raise OSError(number, text)
    assert names(out.parent) == []


def test_too_small_a_disk_is_said_before_the_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(out.parent)._replace(free=2_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    require_space(out, 2_500_000_000)
    with pytest.raises(OutputError, match=r"the bundle needs 18\.80 GB, the disk has 2\.50 GB free; free some"):
        require_space(out, 18_800_000_000)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/proc/bundle", "No such file or directory|Permission denied"),
        ("{tmp}/file/bundle", "Not a directory|File exists"),
        ("{tmp}/file/sub/bundle", "Not a directory|File exists"),
        ("{tmp}/" + "n" * 300, "File name too long"),
        ("{tmp}/" + "n" * 250, "File name too long"),
        ("{tmp}/loop", "Too many levels of symbolic links|Not a directory"),
    ],
)
def test_places_where_nothing_can_be_written(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with (
        pytest.raises(OutputError, match=rf"cannot be written \(({reason})\); choose another folder with -o"),
        new_bundle(Path(path.format(tmp=tmp_path))) as folder,
    ):
        fill(folder, "new")
    assert names(tmp_path) == ["file", "loop"]


@pytest.mark.parametrize("target", ["bundle", "none"])
def test_a_link_stays_a_link(target: str, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "bundle")
    if target == "bundle":
        fill(disk / "bundle", "old")
    with new_bundle(link) as folder:
        assert folder.parents[1] == disk  # a rename can't cross file systems
        fill(folder, "new")
    assert link.is_symlink() and names(link) == bundle_names("new")
    assert names(tmp_path) == ["disk", "link"] and names(disk) == ["bundle"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0])
def test_permissions_follow_the_umask(mask: int, out: Path) -> None:
    before = os.umask(mask)
    try:
        with new_bundle(out) as folder:
            fill(folder, "new")
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["bundle", "glm-4 [fp16]*", "模型"])
def test_stale_folders_are_swept_and_live_ones_are_not(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    stale = [tmp_path / f".{name}.build-{which}" for which in ("killed", "half-marked", "unmarked")]
    others = [tmp_path / ".other.build-killed", tmp_path / f".{name}x.build-killed", tmp_path / "bundle2"]
    for folder in (*stale[:2], *others):
        folder.mkdir()
        (folder / MARKER).write_bytes(scratch._TEXT)
    fill(stale[0] / "new", "left")
    (stale[1] / MARKER).write_bytes(scratch._TEXT[:10])
    stale[2].mkdir()
    with new_bundle(out) as first:
        fill(first, "first")
        assert not any(folder.exists() for folder in stale)
        with new_bundle(out) as second:
            assert first.is_dir() and second != first
            fill(second, "second")
        assert (out / "second").is_file() and (first / "first").is_file()
    assert (out / "first").is_file()
    assert names(tmp_path) == sorted([name, *(folder.name for folder in others)])


@pytest.mark.parametrize("files", [["thesis.txt"], [MARKER], [MARKER, "thesis.txt"], ["new/thesis.txt"]], ids=str)
def test_a_folder_of_the_users_with_a_name_of_ours_stays(files: list[str], out: Path) -> None:
    theirs = out.with_name(".bundle.build-thesis")
    for name in files:
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("mine")
    with new_bundle(out) as folder:
        fill(folder, "new")
    assert contents(theirs) == dict.fromkeys(sorted(files), b"mine")
    assert names(out.parent) == [".bundle.build-thesis", "bundle"]


# From here on whole builds, in processes of their own.

Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one geometry."""
    made = [tmp_path_factory.mktemp("checkpoint") for _ in range(2)]
    for seed, folder in enumerate(made):
        checkpoints.save(checkpoints.random_model(seed), folder)
    return made[0], made[1]


@pytest.fixture(scope="module")
def run(folders: tuple[Path, Path]) -> Iterator[Run]:
    """Run jobs (see build_server) at the same time; returns their exit codes, what they printed is in OUT.log."""
    command = [sys.executable, "-m", "tests.helpers.build_server", str(folders[0])]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def run(out: Path, *jobs: dict[str, Any], checkpoint: Path = folders[0]) -> list[int]:
            argv = ["build", str(checkpoint), "-o", str(out), "--precision", "fp32", "--target", "cpu"]
            logs = [str(log(out, index)) for index in range(len(jobs))]
            lines = [{"argv": argv, "stderr": path, **extra} for path, extra in zip(logs, jobs, strict=True)]
            server.stdin.write(json.dumps(lines) + "\n")
            server.stdin.flush()
            codes: list[int] = json.loads(server.stdout.readline())
            return codes

        yield run
        server.stdin.close()


def log(out: Path, index: int = 0) -> Path:
    return out.parent.with_name(f"{out.parent.name}-{index}.log")


@pytest.fixture(scope="module")
def bundles(run: Run, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """What a build of each checkpoint gives."""
    built = []
    for folder in folders:
        out = tmp_path_factory.mktemp("whole") / "bundle"
        assert run(out, {}, checkpoint=folder) == [0], log(out).read_text()
        read_manifest(out, check_hashes=True)
        built.append(contents(out))
    return built[0], built[1]


def put(out: Path, files: Contents) -> None:
    out.mkdir()
    for name, data in files.items():
        (out / name).write_bytes(data)


def test_the_same_inputs_give_the_same_bytes(run: Run, bundles: Pair, out: Path) -> None:
    assert run(out, {}) == [0]
    assert contents(out) == bundles[0] != bundles[1]
    assert bundles[0].keys() >= {MANIFEST, WEIGHTS, "prefill.onnx", "decode.onnx", "genai_config.json", "config.json"}


TRACING = ["amid a trace", "amid a translation"]
BEFORE = ["at the weights", "amid the weights", "amid a graph", "before the manifest", "before the rename"]


@pytest.mark.parametrize("earlier", [True, False], ids=["over a bundle", "new"])
@pytest.mark.parametrize("point", [*BEFORE, "after the rename"])
def test_kill(point: str, earlier: bool, run: Run, bundles: Pair, folders: Any, out: Path) -> None:
    if earlier:
        put(out, bundles[0])
    assert run(out, {"point": point}, checkpoint=folders[1]) == [-signal.SIGKILL]
    left = contents(out) if out.exists() else None
    if point in BEFORE:
        assert left == (bundles[0] if earlier else None)
    else:
        assert left == bundles[1]
    assert run(out, {}, checkpoint=folders[1]) == [0], log(out).read_text()
    assert contents(out) == bundles[1] and names(out.parent) == ["bundle"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("point", BEFORE)
def test_signal(point: str, number: int, code: int, run: Run, bundles: Pair, folders: Any, out: Path) -> None:
    signal_at(point, number, code, run, bundles, folders, out)


@pytest.mark.parametrize(("point", "number"), [(TRACING[0], signal.SIGHUP), (TRACING[1], signal.SIGINT)])
def test_signal_while_tracing(point: str, number: int, run: Run, bundles: Pair, folders: Any, out: Path) -> None:
    """What runs there catches exceptions of all kinds."""
    signal_at(point, number, 128 + number, run, bundles, folders, out)


def signal_at(point: str, number: int, code: int, run: Run, bundles: Pair, folders: Any, out: Path) -> None:
    put(out, bundles[0])
    assert run(out, {"point": point, "signal_number": number}, checkpoint=folders[1]) == [code]
    assert contents(out) == bundles[0] and names(out.parent) == ["bundle"]
    said = "interrupted" if number == signal.SIGINT else f"glm4export: ended by {signal.Signals(number).name}"
    assert log(out).read_text() == f"{said}\n"


@pytest.mark.parametrize("earlier", [True, False], ids=["over a bundle", "new"])
def test_builds_at_the_same_time(earlier: bool, run: Run, bundles: Pair, out: Path) -> None:
    if earlier:
        put(out, bundles[1])
    for _ in range(2):
        assert run(out, {}, {}, {}) == [0, 0, 0], [log(out, i).read_text() for i in range(3)]
        assert contents(out) == bundles[0] and names(out.parent) == ["bundle"]


def test_a_killed_build_beside_a_live_one(run: Run, bundles: Pair, out: Path) -> None:
    assert run(out, {"point": "amid the weights"}, {}, {"point": "before the rename"}) == [-9, 0, -9]
    assert contents(out) == bundles[0]
    assert run(out, {}) == [0]
    assert contents(out) == bundles[0] and names(out.parent) == ["bundle"]


@pytest.mark.parametrize("size", [10_000, 200_000])
def test_a_write_that_fails(size: int, run: Run, bundles: Pair, folders: Any, out: Path) -> None:
    """RLIMIT_FSIZE makes write() fail as a full disk does."""
    assert size < len(bundles[0][WEIGHTS])
    put(out, bundles[0])
    assert run(out, {"fsize": size}, checkpoint=folders[1]) == [2]
    assert contents(out) == bundles[0] and names(out.parent) == ["bundle"]
    message = f"glm4export: error: {out}: File too large; free some space or choose another disk with -o\n"
    assert log(out).read_text() == message


def pages(*sizes: int) -> int:
    return sum(-(-size // 4096) * 4096 for size in sizes)


@pytest.mark.parametrize("missing", ["weights", "graph", "side file", "manifest"])
def test_a_disk_that_runs_full(missing: str, run: Run, bundles: Pair, small_disk: Callable[[int], Path]) -> None:
    sizes = {name: len(data) for name, data in bundles[0].items()}
    graphs = sizes["prefill.onnx"], sizes["decode.onnx"]
    everything = pages(*sizes.values()) + 4096  # the marker
    room = {
        "weights": pages(sizes[WEIGHTS]) - 4096,
        "graph": pages(1, sizes[WEIGHTS], graphs[0]),
        "side file": pages(1, sizes[WEIGHTS], *graphs, sizes["genai_config.json"]),
        "manifest": everything - pages(sizes[MANIFEST]),
    }[missing]
    disk = small_disk(room)
    assert run(disk / "bundle", {}) == [2]
    text = log(disk / "bundle").read_text()
    assert text.startswith("glm4export: error: ") and text.count("\n") == 1
    expected = "the bundle needs 0.00 GB, the disk has" if missing == "weights" else "No space left on device"
    assert expected in text
    assert names(disk) == []
