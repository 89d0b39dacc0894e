"""Commands that start again with huge pages, and ``load(huge_pages=True)``."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4export import cli, huge_pages, machine
from glm4runtime import load
from glm4runtime.backends.huge_pages import collapse

PAGE = 2 << 20


class Started(Exception):
    """Instead of another process: its file, arguments and environment."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run it with an environment on a kernel that gives huge pages to who asks; what would have been started."""

    def execve(*arguments: Any) -> None:
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # one that arrives now isn't lost
        raise Started(*arguments)

    def start(kernel: str | None = "madvise", **environment: str) -> Any:
        for name in ("GLIBC_TUNABLES", "GLM4EXPORT_TUNABLES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huge_pages, "huge_pages", lambda: kernel)
        monkeypatch.setattr(os, "execve", execve)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            huge_pages.start_with_huge_pages()
        except Started as started:
            return started.args
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return None

    return start


def test_a_command_starts_again_with_the_same_arguments(start: Any) -> None:
    file, arguments, environment = start(OTHER="x")
    assert file == arguments[0] == sys.executable and arguments[1:] == sys.orig_argv[1:]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and environment["OTHER"] == "x"
    assert start(**environment) is None  # and once only
    assert "GLIBC_TUNABLES" not in os.environ and "GLM4EXPORT_TUNABLES" not in os.environ  # its children's


def test_other_tunables_are_kept(start: Any) -> None:
    *_, environment = start(GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    assert start(**environment) is None
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"


@pytest.mark.parametrize("value", ["glibc.malloc.hugetlb=0", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=2"])
def test_a_users_own_setting_stays(value: str, start: Any) -> None:
    assert start(GLIBC_TUNABLES=value) is None
    assert os.environ["GLIBC_TUNABLES"] == value


def test_where_asking_changes_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start("always") is start("never") is start(None) is None
    monkeypatch.setattr(os, "confstr", lambda name: None)  # another C library
    assert start() is None


def test_an_interpreter_that_cannot_be_started_again_goes_on(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert start() is None
    monkeypatch.undo()
    monkeypatch.setattr(huge_pages, "huge_pages", lambda: "madvise")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    huge_pages.start_with_huge_pages()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_command_in_somebody_elses_process_does_not(
    demo_bundles: dict[str, Path], start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start() is not None  # it would
    assert cli.main(["generate", str(demo_bundles["fp32"]), "--prompt", "x", "--max-new-tokens", "1"]) == 0


def test_the_command_itself(demo_bundles: dict[str, Path]) -> None:
    """Arguments, standard input and exit status pass through the second start."""
    command = [sys.executable, "-m", "glm4export", "generate", str(demo_bundles["fp32"]), "--json", "--prompt", "-"]
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        question = "What is the capital of France?"
        return subprocess.run(
            [*command, *more], input=question, capture_output=True, text=True, env=environment, timeout=120
        )

    done = run("--max-new-tokens", "2")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt_tokens"] > 5, done.stderr
    assert run("--top-p", "7").returncode == 2


def in_huge_pages(first: int) -> int:
    """Bytes in huge pages of the mapping at an address; neighbours of the same kind are part of it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        ends = line.split(maxsplit=1)[0].split("-")
        if len(ends) == 2 and int(ends[0], 16) <= first < int(ends[1], 16):
            fields = dict(line.split(":", 1) for _, line in zip(range(22), lines, strict=False) if ":" in line)
            return int(fields["AnonHugePages"].split()[0]) << 10
    raise AssertionError("no such mapping")


def resident(first: int, size: int) -> int:
    """Bytes from an address on that have memory."""
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(first // mmap.PAGESIZE * 8)
        entries = np.frombuffer(pages.read(size // mmap.PAGESIZE * 8), np.uint64)
    return mmap.PAGESIZE * int((entries >> np.uint64(63)).sum())


def test_memory_is_put_into_huge_pages(demo_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 << 20
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[: size // 2] = bytes(range(256)) * (size // 512)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert in_huge_pages(address) == 0
    session = load(demo_bundles["fp32"], huge_pages=True)
    huge = in_huge_pages(address)
    assert memory[: size // 2] == bytes(range(256)) * (size // 512)
    assert resident(address, size) <= size // 2 + 2 * PAGE  # what was never written takes nothing
    if huge == 0 and machine.huge_pages() in ("never", None):
        pytest.skip("this kernel has none to give")
    assert huge >= size // 2 - 2 * PAGE
    assert session.runner.prefill([5, 6]).shape == (2048,)


def test_a_kernel_that_refuses_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no library")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    start = time.perf_counter()
    collapse()
    assert time.perf_counter() - start < 1
