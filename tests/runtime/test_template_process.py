"""Chat templates that never end or eat memory, and the process that they run in."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glm4runtime.contract import UserError
from glm4runtime.text import template_process
from glm4runtime.text.chat import ChatTemplate

ASK = [{"role": "user", "content": "x"}]
PLAIN = "{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}"


def worker_of(template: ChatTemplate) -> subprocess.Popen[bytes]:
    worker = template._process._worker
    assert worker is not None
    return worker._process


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        + "{% endfor %}" * 3
        + "{{ messages }}",
        "{{ lipsum(n=1000000) }}",
        "{{ (messages | length + 9) ** (10 ** 9) }}",  # one call in C
    ],
    ids=["loops", "lorem ipsum", "power"],
)
def test_a_template_that_takes_for_ever_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.3)
    message = r"^chat template: stopped, it takes more than 0\.3 seconds; give a template that ends \(chat_template="
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render(ASK)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",  # folded while it's compiled
        "{{ messages[0].content * 10**10 }}",
        "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t=[0]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% for a in range(90000) %}{{ messages[0].content * 9000 }}{% endfor %}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ messages | tojson(indent=1000000000) }}",
    ],
)
def test_a_template_that_eats_memory_is_stopped(source: str) -> None:
    message = (
        r"^chat template: stopped, it needs more than 512 MB of memory, or writes over 64 million characters; give"
    )
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render(ASK)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ range(10**12) | list }}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nest without end"),
        ("{% set n = namespace(l=[]) %}{% for i in range(90000) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}", "nest"),
        ("{{ " + "not " * 100000 + "1 }}", "nested too deeply"),
    ],
)  # fmt: skip
def test_ranges_and_recursion(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render(ASK)


def test_a_template_goes_on_after_its_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% if spin %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    template = ChatTemplate(source + PLAIN + "{% if fail %}{{ raise_exception('no') }}{% endif %}")
    first = worker_of(template).pid
    with pytest.raises(UserError, match="no"):
        template.render(ASK, fail=True)
    assert template.render(ASK) == "<|user|>\nx" and worker_of(template).pid == first
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.3)
    os.kill(first, signal.SIGKILL)  # as the kernel does where memory runs out
    worker_of(template).wait()
    assert template.render(ASK) == "<|user|>\nx" and worker_of(template).pid != first
    with pytest.raises(UserError, match=r"more than 0\.3 seconds"):
        template.render(ASK, spin=True)
    assert template.render(ASK) == "<|user|>\nx"


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate(PLAIN)
    process = worker_of(template)
    assert process.poll() is None
    del template
    gc.collect()
    assert process.returncode is not None
    with pytest.raises(UserError):
        ChatTemplate("{% if %}")


def test_the_process_sees_next_to_nothing_of_ours() -> None:
    template = ChatTemplate(PLAIN)
    process = worker_of(template)
    proc = Path(f"/proc/{process.pid}")
    environment = proc.joinpath("environ").read_bytes().split(b"\0")
    assert {entry.split(b"=")[0] for entry in environment if entry} <= {b"TZ", b"LD_LIBRARY_PATH", b"LC_CTYPE"}
    assert proc.joinpath("cwd").readlink() == Path("/")
    assert PLAIN.encode() not in proc.joinpath("cmdline").read_bytes()
    files = {path.name: str(path.readlink()) for path in proc.joinpath("fd").iterdir()}
    assert files["0"].startswith("socket:") and files["1"] == files["2"] == "/dev/null"
    assert not [file for file in files.values() if file.startswith("/") and file != "/dev/null"]
    assert os.getsid(process.pid) == process.pid  # Ctrl-C at the terminal isn't for it
    limits = proc.joinpath("limits").read_text()
    assert f"Max address space         {512 * 2**20}" in limits


def test_from_many_threads() -> None:
    template = ChatTemplate(PLAIN)

    def ask(number: int) -> str:
        return template.render([{"role": "user", "content": str(number)}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(200))) == [f"<|user|>\n{number}" for number in range(200)]


def test_limits_hold_where_the_parent_blocks_their_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.3)
    monkeypatch.setattr(template_process, "CLOCK_SECONDS", 20.0)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    ignored = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=r"stopped, it takes more than 0\.3 seconds"):
            ChatTemplate("{{ lipsum(n=1000000) }}").render([])
    finally:
        signal.signal(signal.SIGPROF, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_process_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(PLAIN)  # takes longer where the machine is busy
    monkeypatch.setattr(template_process, "CLOCK_SECONDS", 0.5)
    worker_of(template).send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=r"stopped, no answer in 0\.5 seconds"):
        template.render(ASK)


def test_an_interrupt_while_it_renders() -> None:
    source = "{% if spin %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    template = ChatTemplate(source + PLAIN)
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        template.render(ASK, spin=True)
    assert template.render(ASK) == "<|user|>\nx"  # not the answer to what was interrupted


KILLED = """
import os, signal
from glm4runtime.text.chat import ChatTemplate

template = ChatTemplate("")
print(template._process._worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_parent_leaves_no_process_behind() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    status = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(600):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":  # nobody here collects orphans
                return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


FORK = """
import os, sys, threading
from glm4runtime.text.chat import ChatTemplate

template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
def ask(text):
    return template.render([{"role": "user", "content": text}])

assert ask("a") == "a"
theirs = template._process._worker._process.pid
template._process._lock.acquire()  # as another thread would hold it: it isn't there in the child
children = []
for number in range(3):
    child = os.fork()
    if not child:
        good = all(ask(f"{number} {i}") == f"{number} {i}" for i in range(50))
        good = good and template._process._worker._process.pid != theirs
        sys.exit(0 if good else 1)  # with everything that is done at exit
    children.append(child)
template._process._lock.release()
assert all(ask(str(i)) == str(i) for i in range(50))
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
assert ask("b") == "b" and template._process._worker._process.pid == theirs
print("done")
"""


def test_after_a_fork_each_process_has_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_python_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for python, message in (
        ("/nowhere/python", "couldn't be started"),
        ("/bin/false", "ended with status 1: /bin/false"),
    ):
        monkeypatch.setattr("multiprocessing.spawn._python_exe", python)
        with pytest.raises(UserError, match=f"rendered in a Python process of its own, which {message}"):
            ChatTemplate(PLAIN)


def test_values_arrive_as_they_are() -> None:
    values = {"t": (1, (2.5, None)), "keys": {1: "a", None: "b"}, "inf": float("inf"), "big": 10**5000 % 10**20}
    shown = ChatTemplate("{{ t }} {{ keys }} {{ inf }} {{ big }} {{ odd | length }}").render([], **values, odd="\ud800")
    assert shown == "(1, (2.5, None)) {1: 'a', None: 'b'} inf 0 1"
