"""Signals end a command at once, whatever runs: undone, with 128 and the signal's number, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4runtime import signals
from glm4runtime.folder import scratch
from glm4runtime.folder.scratch import locked, scratch_folder, sweep
from tests.helpers.small_bundles import names

BEGIN = """
import os, signal, sys
from pathlib import Path
from glm4runtime import signals
from glm4runtime.folder.scratch import scratch_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background of a shell ignores it
number, folder = int(sys.argv[1]), Path(sys.argv[2])
die = lambda: os.kill(os.getpid(), number)
signals.install()
"""
CODES = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(code: str, number: int = signal.SIGTERM, begin: str = BEGIN) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", begin + code, str(int(number)), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


SWALLOWED = {
    "caught": "try: die()\nexcept BaseException: pass",
    "wrapped": "try: die()\nexcept BaseException as error: raise RuntimeError('something else') from error",
    "in a destructor": "class Late:\n def __del__(self): die()\nlate = Late()\ndel late",
    "in a callback": "import ctypes\nctypes.CFUNCTYPE(None)(die)()",
    "in an import": "(folder / 'late.py').write_text('import __main__; __main__.die()')\n"
    "sys.path.insert(0, str(folder))\ntry: import late\nexcept BaseException: pass",
}


@pytest.mark.parametrize("how", SWALLOWED)
@pytest.mark.parametrize(("number", "code"), CODES)
def test_nothing_swallows_a_signal(how: str, number: int, code: int, run: Run, tmp_path: Path) -> None:
    body = "\n".join(f"    {line}" for line in SWALLOWED[how].splitlines())
    made = "with scratch_folder(folder, 'x-') as made:\n    (made / 'file').touch()"
    done = run(f"{made}\n{body}\nprint('went on')", number)
    said = "interrupted" if number == signal.SIGINT else f"glm4export: ended by {signal.Signals(number).name}"
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{said}\n")
    assert [name for name in names(tmp_path) if name.startswith("x-")] == []


def test_what_was_printed_is_not_lost(run: Run) -> None:
    assert run("print('text', end='')\ndie()").stdout == "text"


def test_what_is_undone_is_the_latest_first_and_only_while_it_lasts(run: Run) -> None:
    code = """
with signals.undone(lambda: print("never")): pass
with signals.undone(lambda: print("first")), signals.undone(lambda: 1 / 0), signals.undone(lambda: print("last")):
    die()
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "last\nfirst\n", "glm4export: ended by SIGTERM\n")


def test_further_signals_do_not_cut_the_undoing(run: Run) -> None:
    done = run("with signals.undone(lambda: [die(), os.kill(os.getpid(), 2), print('undone')]): die()")
    assert (done.returncode, done.stdout) == (143, "undone\n")


def test_a_signal_that_is_held_comes_at_the_end(run: Run) -> None:
    done = run("with signals.held():\n with signals.held():\n  die()\n print('whole')\nprint('too far')")
    assert (done.returncode, done.stdout) == (143, "whole\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number: int, run: Run) -> None:
    """As ``nohup`` asks, and a shell for what it runs in the background."""
    begin = BEGIN.replace("signals.install()", "signal.signal(number, signal.SIG_IGN)\nsignals.install()")
    done = run("die()\nprint('went on')", number, begin)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_fork_undoes_nothing_of_its_parent(run: Run) -> None:
    code = """
with signals.undone(lambda: print("the parent's")):
    child = os.fork()
    if not child:
        die()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code).stdout == "143\n"


def test_no_standard_error_to_say_it_on(run: Run) -> None:
    assert run("os.close(2); os.close(1)\ndie()", signal.SIGHUP).returncode == 129


@pytest.mark.parametrize(("number", "error"), [(2, KeyboardInterrupt), (15, SystemExit), (1, SystemExit)])
def test_in_a_conversation_signals_raise(number: int, error: type[BaseException]) -> None:
    with pytest.raises(error) as caught, signals.handled(), signals.raised():
        os.kill(os.getpid(), number)
    assert number == 2 or caught.value.args == (128 + number,)


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    with signals.handled():
        assert {signal.getsignal(number) for number in signals.ENDING} == {signals._on_signal}
        with signals.handled():
            pass
        assert signal.getsignal(signal.SIGTERM) is signals._on_signal
    assert {number: signal.getsignal(number) for number in signals.ENDING} == before
    thread = threading.Thread(target=lambda: names(Path("/")) if signals.install() == {} else 1 / 0)
    thread.start()
    thread.join()


def test_the_command_handles_them_before_it_imports_anything() -> None:
    """What is imported at the time: the standard library and two small modules."""
    code = """
import sys
before = set(sys.modules)
from glm4runtime import signals
signals.install = lambda: print(sorted(name for name in set(sys.modules) - before if name.startswith("glm4"))) or exit()
from glm4export.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['glm4export', 'glm4export.__main__', 'glm4runtime', 'glm4runtime.signals']\n"


# Scratch folders and locks


def test_a_lock_that_is_held_is_waited_for_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path, "another build") as waited:
        assert not waited and capsys.readouterr().err == ""
        told = threading.Event()
        found: list[bool] = []

        def wait() -> None:
            with locked(tmp_path, "another build") as waited:
                found.append(waited)

        class Said:
            def write(self, text: str) -> None:
                said.append(text)
                told.set()

            def flush(self) -> None: ...

        said: list[str] = []
        stderr, sys.stderr = sys.stderr, Said()  # type: ignore[assignment]
        try:
            thread = threading.Thread(target=wait)
            thread.start()
            assert told.wait(30)
        finally:
            sys.stderr = stderr
        assert found == []
    thread.join()
    assert found == [True]
    assert "".join(said).startswith(f"glm4export: waiting for another build ({tmp_path} is locked)")


def test_a_wait_for_a_lock_can_be_interrupted(run: Run, tmp_path: Path) -> None:
    code = """
from glm4runtime.folder.scratch import locked
signal.signal(signal.SIGALRM, lambda *_: die())
signal.setitimer(signal.ITIMER_REAL, 0.2)
with locked(folder, "another build"): print("went on")
"""
    with locked(tmp_path, "x"):
        done = run(code)
    assert (done.returncode, done.stdout) == (143, "")
    said = [f"glm4export: waiting for another build ({tmp_path} is locked)", "glm4export: ended by SIGTERM"]
    assert done.stderr.splitlines() == said


@pytest.mark.parametrize("number", scratch._NO_LOCKS)
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds go on, and nothing is swept, since a folder in use can't be told from one that was left."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(scratch.fcntl, "flock", flock)
    with locked(tmp_path, "x") as waited, scratch_folder(tmp_path, "x-") as first:
        sweep(tmp_path, "x-")
        assert not waited and first.is_dir()
    assert names(tmp_path) == []


def test_removal_ends_with_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed amid it, the folder is still known as ours."""
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: (removed.append(path.name), unlink(path))[1])
    with scratch_folder(tmp_path, "x-") as folder:
        for name in (".a", "b", "z"):
            (folder / name).touch()
    assert sorted(removed[:-1]) == [".a", "b", "z"] and removed[-1] == scratch.MARKER


def test_a_folder_that_lost_its_marker_is_kept(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "x-") as folder:
        (folder / "file").touch()
        (folder / scratch.MARKER).unlink()
    assert names(folder) == ["file"]
