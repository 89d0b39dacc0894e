"""What a loaded bundle does to its machine and its process: nothing is written or sent, and forks neither hang nor lie.

One child loads a bundle where ONNX Runtime would write under HOME at once and call out through a proxy nine seconds
later. It's left alone while the other tests run, and looked at last.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Where onnxruntime 1.32 finds one of these, it takes the machine for a build server and keeps silent.
_SILENCING = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "TRAVIS", "JENKINS_URL", "GITLAB_CI", "APPVEYOR", "CIRCLECI")
_CALLS_AFTER = 9  # seconds from the import, in onnxruntime 1.32 and onnxruntime-genai 0.18


@dataclass
class Child:
    """A process that loaded a bundle and waits for the end of its input, its HOME, and the proxy it was told of."""

    process: subprocess.Popen[str]
    home: Path
    proxy: socket.socket
    ready: float  # when it had loaded, on the monotonic clock


@pytest.fixture(scope="module", autouse=True)
def child(demo_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    home, proxy = tmp_path_factory.mktemp("home"), socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name not in _SILENCING}
    environment.pop("XDG_CACHE_HOME", None)
    environment |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"), address)
    environment |= {"HOME": str(home), "NO_PROXY": "", "no_proxy": "", "ORT_DISABLE_TELEMETRY": "0"}
    code = (
        "import sys\n"
        "from glm4runtime import SamplingParams, load\n"
        f"session = load({str(demo_bundles['fp32'])!r})\n"
        "list(session.generate([5, 6, 7], SamplingParams(max_new_tokens=4)))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with (
        proxy,
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Child(process, home, proxy, time.monotonic())


def test_no_file_is_written_under_home(child: Child) -> None:
    assert [path for path in child.home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("package", ["glm4runtime", "glm4export", "tests"])
def test_every_package_switches_telemetry_off_before_anything_else(package: str) -> None:
    """What torch's exporter or a test imports of onnxruntime comes later; ruff's TID253 watches the rest."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert not name.startswith(('onnxruntime', 'torch')) or os.environ.get(key) == '1', name\n"
        "key = 'ORT_DISABLE_TELEMETRY'\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {package}\n"
        "print(os.environ[key])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


FORK = """
import gc, os, sys
from glm4runtime import UserError, load
session = load({bundle!r}, threads=2)
session.runner.prefill([5, 6, 7])
pid = os.fork()
if not pid:
    {child}
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
print(len(session.runner.decode(5)))
"""


@pytest.mark.parametrize(
    ("child_code", "said"),
    [
        ("del session; gc.collect()", ""),
        ("pass", ""),  # the interpreter's end drops it
        ("session = load({bundle!r}, threads=2); print(len(session.runner.prefill([5, 6, 7])), flush=True)", "2048\n"),
        (
            "\n    try: session.runner.decode(8)\n    except UserError as error: print(error, flush=True)",
            "this session was loaded before the process forked, and works in the parent only; load the bundle in the "
            "child\n",
        ),
        ("session.close()", ""),
    ],
    ids=["drop", "leave", "load", "use", "close"],
)
def test_a_session_and_a_fork(child_code: str, said: str, demo_bundles: dict[str, Path]) -> None:
    """Dropping or leaving an inherited session hung: ONNX Runtime waited for threads that a child hasn't got."""
    bundle = str(demo_bundles["fp32"])
    code = FORK.format(bundle=bundle, child=child_code.replace("{bundle!r}", repr(bundle)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == "" and done.stdout == f"{said}0\n2048\n"


def test_nothing_is_sent(child: Child) -> None:
    child.proxy.settimeout(max(0.1, child.ready + _CALLS_AFTER + 3 - time.monotonic()))
    with pytest.raises(TimeoutError):
        child.proxy.accept()
    assert child.process.poll() is None
    assert [path for path in child.home.rglob("*") if path.is_file()] == []
