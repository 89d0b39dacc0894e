"""Output paths of every kind: which a build takes, and which it must refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attacks.files import Attack, Tally, files, run
from glm4runtime.backends.prepare import prepare
from glm4runtime.contract import read_manifest


@dataclass(frozen=True)
class Case:
    """An output path. ``make`` lays out the folder and returns what -o is given; ``builds``: it must succeed."""

    name: str
    make: Callable[[Attack, Path], str]
    builds: bool
    folder: str = ""  # to work in, below the case's own


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def bundle_with(attack: Attack, place: Path, *names: str) -> str:
    shutil.copytree(attack.bundles[0], place / "out")
    for name in names:
        write(place / "out" / name)
    return "out"


def made(attack: Attack, place: Path, path: str, link: str | None = None) -> str:
    """Make a folder, or a link, and name it."""
    if link is None:
        (place / path).mkdir(parents=True)
    else:
        (place / path).symlink_to(link)
    return path


def linked_bundle(attack: Attack, place: Path) -> str:
    shutil.copytree(attack.bundles[0], place / "disk" / "bundle")
    return made(attack, place, "link", "disk/bundle")


def half_bundle(attack: Attack, place: Path) -> str:
    bundle_with(attack, place)
    (place / "out" / "weights.bin").unlink()
    return "out"


def foreign(attack: Attack, place: Path) -> str:
    write(place / "out" / "weights.bin")
    write(place / "out" / "manifest.json", '{"name": "my app"}')
    return "out"


def prepared(attack: Attack, place: Path) -> str:
    bundle_with(attack, place)
    prepare(place / "out", read_manifest(place / "out"))
    return "out"


def loop(attack: Attack, place: Path) -> str:
    (place / "a").symlink_to("b")
    return made(attack, place, "b", "a")


def read_only(attack: Attack, place: Path) -> str:
    (place / "ro").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place / "ro"], check=True, capture_output=True)
    return "ro/out"


def mounted(attack: Attack, place: Path) -> str:
    (place / "out").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place / "out"], check=True, capture_output=True)
    return "out"


def mounted_bundle(attack: Attack, place: Path) -> str:
    mounted(attack, place)
    shutil.copytree(attack.bundles[0], place / "out", dirs_exist_ok=True)
    return "out"


def checkpoint_link(attack: Attack, place: Path) -> str:
    """A link to the checkpoint's folder."""
    return made(attack, place, "link", str(attack.checkpoints[1]))


CASES = (
    Case("new", lambda attack, place: "out", True),
    Case("new, with parents", lambda attack, place: "a/b/out", True),
    Case("an earlier bundle", bundle_with, True),
    Case("a prepared bundle", prepared, True),
    Case("a bundle without its weights", half_bundle, True),
    Case("empty folder", lambda attack, place: made(attack, place, "out"), True),
    Case("trailing slash", lambda attack, place: made(attack, place, "out") + "/", True),
    Case("absolute", lambda attack, place: str(place / "out"), True),
    Case(". in an empty folder", lambda attack, place: (made(attack, place, "here"), ".")[1], True, "here"),
    Case(".. of an empty folder", lambda attack, place: (made(attack, place, "here/sub"), "..")[1], False, "here/sub"),
    Case(". in a folder with files", lambda attack, place: (write(place / "NOTES.md"), ".")[1], False),
    Case("unicode", lambda attack, place: "模型 ✓", True),
    Case("newline", lambda attack, place: "a\nb", True),
    Case("glob", lambda attack, place: "[a]*?", True),
    Case("option-like", lambda attack, place: "./--json", True),
    Case("link to a bundle", linked_bundle, True),
    Case("dangling link", lambda attack, place: made(attack, place, "link", "none"), True),
    Case("link loop", loop, False),
    Case("link to the checkpoint", checkpoint_link, False),
    Case("the checkpoint", lambda attack, place: str(attack.checkpoints[1]), False),
    Case("in the checkpoint", lambda attack, place: str(attack.checkpoints[1] / "sub" / "out"), False),
    Case("holds the checkpoint", lambda attack, place: str(attack.root), False),
    Case("a file", lambda attack, place: write(place / "out").name, False),
    Case("below a file", lambda attack, place: write(place / "out").name + "/sub", False),
    Case("name too long", lambda attack, place: "n" * 256, False),
    Case("path too long", lambda attack, place: "/".join(["n" * 200] * 25), False),
    Case("somebody's manifest and weights", foreign, False),
    Case("notes beside a bundle", lambda attack, place: bundle_with(attack, place, "NOTES.md"), False),
    Case("results beside a bundle", lambda attack, place: bundle_with(attack, place, "results/a.csv"), False),
    Case("an edited template", lambda attack, place: bundle_with(attack, place, "chat_template.jinja"), False),
    Case("notes in prepared", lambda attack, place: bundle_with(attack, place, "prepared/NOTES.md"), False),
    Case("named like scratch", lambda attack, place: write(place / ".out.build-a" / "x").parent.name, False),
    Case("beside one named so", lambda attack, place: (write(place / ".out.build-a" / "x"), "out")[1], True),
    Case("/proc", lambda attack, place: "/proc/out", False),
    Case("/", lambda attack, place: "/", False),
    Case("a read-only disk", read_only, False),
    Case("a mount point", mounted, True),
    Case("a mounted bundle", mounted_bundle, True),
)


@contextmanager
def case_folder(attack: Attack) -> Iterator[Path]:
    place = attack.root / "case"
    place.mkdir()
    try:
        yield place
    finally:
        for name in ("out", "ro"):
            if (place / name).is_mount():
                subprocess.run(["umount", place / name], check=True)
        shutil.rmtree(place)


def output_paths(attack: Attack) -> Iterator[tuple[str, Tally]]:
    """Each case: builds or is refused, as it must; no traceback; every other file as it was."""
    for case in CASES:
        tally = Tally()
        with case_folder(attack) as place:
            try:
                out = case.make(attack, place)
            except subprocess.CalledProcessError:
                yield f"{case.name} (skipped: mounting is not permitted)", tally
                continue
            write(place / "beside.txt")
            before, inputs = files(place), files(attack.checkpoints[1])
            code = run(attack.build(attack.checkpoints[1], out), attack.log, place / case.folder)
            said = attack.log.read_text()
            tally.tried, tally.codes = 1, Counter([code])
            tally.expect(code == (0 if case.builds else 2), f"status {code}: {said[-300:]}")
            tally.expect("Traceback" not in said, said[-300:])
            after = files(place)
            target = os.path.relpath(os.path.realpath(place / case.folder / out), place)
            replaced = [name for name in before if case.builds and f"{name}/".startswith(f"{target}/")]
            kept = {name: data for name, data in before.items() if name not in replaced}
            tally.expect(all(after.get(name) == data for name, data in kept.items()), "files lost or changed")
            tally.expect(case.builds or after == before, f"left {sorted(set(after) - set(before))[:5]}")
            tally.expect(files(attack.checkpoints[1]) == inputs, "the checkpoint was changed")
            if case.builds:
                built = files(place / case.folder / out)
                tally.expect(built == attack.whole[1], "not the bundle that it should be")
                tally.expect(not list(place.rglob(".*build-*/new")), "scratch folders left")
        yield case.name, tally
