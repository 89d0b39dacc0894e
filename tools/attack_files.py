"""Kill builds and prepares at random moments, and build into all kinds of output paths: is a file lost?

    python tools/attack_files.py --kills 200 --processes 40

A kill is a signal, SIGHUP, SIGINT, SIGTERM or SIGKILL, sent after a random time. Most are sent to forks of this
process, which has torch imported already: to builds that trace, to builds whose graphs are traced (so that all the time
goes into writing), and to prepares. The others are sent to processes of their own. After each it is asked what
``glm4export`` promises: exit status 128 and the signal's number, or 0 where the work was done before; one line on
standard error, and no traceback; the earlier bundle whole, or the new one; no other file changed, and none left (after
SIGKILL: none left once the next build has begun). Then come the output paths. Exits with 1 where anything was found.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from glm4export import cli
from glm4export.bundle.folder import check_output
from glm4export.sources.checkpoint import locate
from glm4runtime.backends.prepare import prepare
from glm4runtime.contract import UserError, read_manifest

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
HANDLED = sum(1 << (number - 1) for number in SIGNALS[:3])  # as /proc/PID/status has them
Files = dict[str, str]


@dataclass
class Tally:
    """Counts and findings of one kind of attack."""

    tried: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.findings.append(what)


def files(folder: Path) -> Files:
    """What a folder holds, by name: sha256 of files, targets of links, "/" for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = "/" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def fork(argv: list[str], log: Path, folder: Path) -> int:
    """Run the command line in a fork that works in ``folder``; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.chdir(folder)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = cli.main(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(argv: list[str], log: Path, folder: Path) -> int:
    return finish(fork(argv, log, folder))


class Attack:
    """Two checkpoints, what a build of each gives, and a folder where one is built over the other."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.log, self.random = root, root / "log", random.Random(seed)
        self.checkpoints = [root / name for name in ("first", "second")]
        for sign, folder in zip((1, -1), self.checkpoints, strict=True):
            shutil.copytree(locate(None).folder, folder)
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"] *= sign
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.bundles = [root / f"{folder.name}-bundle" for folder in self.checkpoints]
        for checkpoint, bundle in zip(self.checkpoints, self.bundles, strict=True):
            assert run(self.build(checkpoint, bundle), self.log, root) == 0, self.log.read_text()
        self.whole = [files(bundle) for bundle in self.bundles]
        self.place = root / "place"

    @staticmethod
    def build(checkpoint: Path, out: Path | str) -> list[str]:
        return ["build", str(checkpoint), "-o", str(out), "--precision", "fp32", "--target", "cpu"]

    def lay_out(self, earlier: bool) -> Files:
        """The folder as a user has it before; a copy of a bundle, and files of the user's around it."""
        shutil.rmtree(self.place, ignore_errors=True)
        theirs = self.place / ".out.build-theirs"
        theirs.mkdir(parents=True)
        for path in (self.place / "NOTES.md", theirs / "thesis.txt"):
            path.write_text("mine")
        if earlier:
            shutil.copytree(self.bundles[0], self.place / "out")
        return files(self.place)

    def kill_build(self, tally: Tally, start: Callable[[list[str]], int], longest: float) -> None:
        """One kill of a build over an earlier bundle, or of a new one, and a look at what is left."""
        earlier, number = self.random.random() < 0.7, self.random.choice(SIGNALS)
        before = self.lay_out(earlier)
        process = start(self.build(self.checkpoints[1], self.place / "out"))
        delay = self.random.uniform(0, longest)
        code = self.kill(tally, process, number, delay)
        where = f"build, {number.name} after {delay:.2f} s, status {code}"
        if number == signal.SIGKILL:
            tally.expect(self.same_but_scratch(before), f"{where}: files lost or changed")
            try:
                check_output(self.place / "out")
            except UserError as error:
                tally.findings.append(f"{where}: the next build is refused: {error}")
        left = files(self.place)
        new = {**{name: data for name, data in before.items() if not name.startswith("out")}, "out": "/"}
        new |= {f"out/{name}": data for name, data in self.whole[1].items()}
        tally.expect(left in (before, new), f"{where}: {sorted(set(left) ^ set(before))[:5]} differ from before")
        tally.expect(code != 0 or left == new, f"{where}: succeeded without its bundle")

    def same_but_scratch(self, before: Files) -> bool:
        """Right after a SIGKILL: the user's own files are there, and the earlier bundle or the new one."""
        left = files(self.place)
        own = [name for name in before if not name.startswith("out")]
        out = {name.removeprefix("out/"): data for name, data in left.items() if name.startswith("out/")}
        whole = ({}, *self.whole) if "out" not in before else self.whole
        return all(left.get(name) == before[name] for name in own) and out in whole

    def kill_prepare(self, tally: Tally, start: Callable[[list[str]], int], longest: float) -> None:
        """One kill of a prepare: the bundle stays as it was, with all of ``prepared`` or none of it."""
        number = self.random.choice(SIGNALS)
        before = self.lay_out(earlier=True)
        out = self.place / "out"
        process = start(["prepare", str(out)])
        delay = self.random.uniform(0, longest)
        code = self.kill(tally, process, number, delay)
        where = f"prepare, {number.name} after {delay:.2f} s, status {code}"
        if number == signal.SIGKILL:
            left = files(self.place)
            tally.expect(all(left.get(name) == data for name, data in before.items()), f"{where}: files lost")
            process = fork(["prepare", str(out)], self.log, self.root)
            tally.expect(finish(process) == 0, f"{where}: the next prepare fails: {self.log.read_text()}")
        left = files(self.place)
        prepared = {name for name in left if name.startswith("out/prepared")}
        added = {name for name in left if name not in before}
        tally.expect(all(left.get(name) == data for name, data in before.items()), f"{where}: files lost or changed")
        tally.expect(added == prepared and len(prepared) in (0, 8), f"{where}: left {sorted(added)[:5]}")

    def kill(self, tally: Tally, process: int, number: signal.Signals, delay: float) -> int:
        time.sleep(delay)
        os.kill(process, number)
        code = finish(process)
        tally.tried += 1
        tally.codes[code] += 1
        expected = -number if number == signal.SIGKILL else 128 + number
        said = self.log.read_text()
        tally.expect(code in (0, expected), f"{number.name} after {delay:.2f} s: status {code}; {said[-300:]}")
        tally.expect("Traceback" not in said, f"{number.name} after {delay:.2f} s: {said[-300:]}")
        tally.expect(said.count("\n") <= 1, f"{number.name} after {delay:.2f} s: says {said[-300:]}")
        return code


def process_of_its_own(log: Path, folder: Path) -> Callable[[list[str]], int]:
    """Starts ``python -m glm4export``."""

    def start(argv: list[str]) -> int:
        with log.open("w") as output:
            command = [sys.executable, "-m", "glm4export", *argv]
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        process.returncode = 0  # waited for by its id
        return handling(process.pid)

    return start


def handling(process: int) -> int:
    """Wait until a process handles its signals, or ended: what comes before is Python's own start, or the fork's."""
    while True:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        if status["State"].strip().startswith("Z") or int(status["SigCgt"], 16) & HANDLED == HANDLED:
            return process
        time.sleep(0.001)


def kills(attack: Attack, count: int, processes: int) -> Iterator[tuple[str, Tally]]:
    """Kills of each kind, shown while they go on; ``processes`` of them of processes of their own."""

    def forked(argv: list[str]) -> int:
        attack.log.write_text("")
        return handling(fork(argv, attack.log, attack.root))

    own = process_of_its_own(attack.log, attack.root)
    forks = max(0, count - processes)
    kinds: list[tuple[str, int, Callable[[list[str]], int], bool, list[str] | None]] = [
        ("trace and write (forks)", forks // 3, forked, True, None),
        ("prepare (forks)", forks // 3, forked, False, None),
        ("write (forks, traced before)", forks - 2 * (forks // 3), forked, True, ["traced"]),
        ("build (processes)", processes - processes // 4, own, True, None),
        ("prepare (processes)", processes // 4, own, False, None),
    ]
    for name, tries, start, builds, traced in kinds:
        if traced:  # from here on forks inherit the traces
            keep_traces(attack)
        attack.lay_out(earlier=True)
        begun = time.monotonic()
        argv = attack.build(attack.checkpoints[1], attack.place / "out") if builds else ["prepare", "place/out"]
        assert finish(start(argv)) == 0, attack.log.read_text()
        longest, tally = time.monotonic() - begun, Tally()
        for index in range(tries):
            if sys.stderr.isatty():
                print(f"\r{name} {index + 1}/{tries}", end="", file=sys.stderr)
            (attack.kill_build if builds else attack.kill_prepare)(tally, start, longest)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        yield f"{name}, up to {longest:.1f} s", tally


def keep_traces(attack: Attack) -> None:
    """Trace in this process, without leaving a build, and have builds copy what that gave."""
    from glm4export.build import build
    from glm4export.build.options import BuildOptions
    from glm4export.sources.config import read_config
    from glm4runtime.contract import graph_names

    traced = functools.cache(build.trace)
    build.trace = lambda *arguments, **named: traced(*arguments, **named).clone()
    config = read_config(attack.checkpoints[1] / "config.json")
    for name in graph_names("cpu"):
        dtype = BuildOptions("fp32", "cpu").compute_dtype
        build.trace(config, name, dtype=dtype, max_seq_len=config.max_position_embeddings)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python tools/attack_files.py --kills 20 --processes 4 --seed 1",
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--processes", type=int, default=40, metavar="N", help="of the kills, in processes of their own (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments (default: %(default)s)")
    arguments = parser.parse_args()

    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)  # ignored under nohup and in a shell's background, and so by all here
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    findings = 0
    with tempfile.TemporaryDirectory() as root:
        attack = Attack(Path(os.path.realpath(root)), arguments.seed)
        print(f"{'attack':<48} {'tried':>5}  {'exit statuses':<40} findings")
        for made_by in (kills(attack, arguments.kills, arguments.processes), output_paths(attack)):
            for name, tally in made_by:
                codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.codes.items()))
                print(f"{name:<48} {tally.tried:>5}  {codes:<40} {len(tally.findings)}", flush=True)
                for finding in tally.findings:
                    print(f"    {finding}")
                findings += len(tally.findings)
    print(f"{findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
