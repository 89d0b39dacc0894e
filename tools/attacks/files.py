"""The folders that tools/attack_files.py works in: what they hold, and command lines run in forks."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file

from glm4export import cli
from glm4export.bundle.folder import check_output
from glm4export.sources.checkpoint import locate
from glm4runtime.contract import UserError

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
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
