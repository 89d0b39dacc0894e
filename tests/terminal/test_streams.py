"""Standard streams that are closed, full, or of another encoding than UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAY = """
import json, os, sys
from glm4export.terminal import streams
streams.prepare()
opened = os.open("/dev/zero", os.O_RDONLY)
print(json.dumps({"text": "na\\u00efve \\u4f60 \\U0001f600 \\udc80", "opened": opened}, ensure_ascii=False), flush=True)
print("to stderr \\u4f60", file=sys.stderr)
assert sys.stdin.read() == ""
"""


def run(shell: str, code: str = SAY, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = ["sh", "-c", f'"$@" {shell}', "sh", sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "gbk"])
def test_what_an_encoding_lacks_is_escaped(encoding: str) -> None:
    done = run("", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert json.loads(text)["text"] == "naïve 你 😀 \udc80"  # as JSON has it, with surrogate pairs
    assert ("你" in text) is (encoding in ("utf-8", "gbk")) and ("ï" in text) is (encoding in ("latin-1", "utf-8"))


def test_the_c_locale_without_pythons_own_remedy() -> None:
    done = run("", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="")
    assert done.returncode == 0 and json.loads(done.stdout)["text"].startswith("naïve 你 😀")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = run(closed)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert bool(done.stdout) is (closed in ("<&-", "2>&-"))
    assert (b"to stderr" in done.stderr) is ("2>&-" not in closed)
    if done.stdout:
        assert json.loads(done.stdout)["opened"] > 2  # a file is never what others take for a standard stream


@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_an_error_that_nobody_can_read(shell: str) -> None:
    code = "import sys; from glm4export.cli import main; sys.exit(main(['engine', '/nowhere/at/all']))"
    done = run(shell, code)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_generate_prints_what_it_can(demo_bundles: dict[str, Path]) -> None:
    code = """import sys
from glm4export.cli import main
sys.exit(main(["generate", sys.argv[1], "--prompt", "你好", "--raw", "--max-new-tokens", "8"]))"""
    texts = {}
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(demo_bundles["fp32"])],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=120,
        )
        texts[encoding] = done.stdout.decode(encoding)
        assert (done.returncode, done.stderr) == (0, b"")
    assert texts["ascii"] == "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in texts["utf-8"])
