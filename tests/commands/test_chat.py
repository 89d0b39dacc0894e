"""``glm4export chat``: questions and commands from a pipe, and on a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4export import cli
from glm4export.commands.questions import command_of, joined
from glm4runtime import SamplingParams, Session
from tests.commands.conftest import Fails
from tests.helpers.processes import GLM4EXPORT, PREFIX
from tests.helpers.terminal import Terminal

Talk = Callable[..., str]
FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."
ADDING = ("Think step by step.", "What is 12 + 15?")  # the embedded model then thinks


class _Typed(io.StringIO):
    """As if somebody typed it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Give lines to a chat with the embedded model; returns what it prints. status: the one that it must end with."""

    def run(*lines: str, options: tuple[str, ...] = (), typed: bool = False, status: int = 0) -> str:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", _Typed(text) if typed else io.StringIO(text))
        assert cli.main(["chat", str(demo_bundles["fp32"]), *options]) == status
        found = capsys.readouterr()
        return found.out if not status else found.err

    return run


def test_a_conversation(talk: Talk, demo_sessions: dict[str, Session], tmp_path: Path) -> None:
    """Later turns see earlier ones, but not those that were taken back; what is saved is the same as what was said."""
    file = tmp_path / "said.json"
    lines = ("My name is Ada.", "Who are you?", "/undo", "", "What is my name?", f"/save {file}", "/reset", FRANCE)
    out = talk(*lines, options=("--max-new-tokens", "32"))
    said = json.loads(file.read_text())
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    params = SamplingParams(max_new_tokens=32)
    assert said[1]["content"] == demo_sessions["fp32"].chat(said[:1], params).read()
    assert said[3]["content"] == "Your name is Ada."
    assert said[2]["content"] == "What is my name?"
    first, unsaid, second, saved, alone = out.splitlines()
    assert (first, second, alone) == (said[1]["content"], "Your name is Ada.", PARIS)
    assert unsaid == "I am the small demo GLM-4 of glm4export." and saved == f"{file}: 4 messages"
    assert talk(f"/load {file}", "What is my name?").splitlines() == [saved, "Your name is Ada."]


def test_thoughts_are_no_part_of_the_conversation(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    system, question = ADDING
    assert talk(f"/system {system}", question, f"/save {file}") == f"12 + 15 = 27.\n{file}: 3 messages\n"
    assert json.loads(file.read_text())[0] == {"role": "system", "content": system}
    assert talk(question, "/system", "/undo", f"/save {file}", options=("--system", system)).startswith("12 + 15 = 27.")
    assert json.loads(file.read_text()) == []


def test_answers_stop_before_strings(talk: Talk) -> None:
    assert talk(FRANCE, options=("--stop", "nowhere", "--stop", " of")) == "The capital\n"


def test_a_question_that_has_no_room_is_taken_back(talk: Talk) -> None:
    options, long = ("--max-seq-len", "48"), "hello " * 60
    assert re.search(r"the prompt needs \d+ tokens, the cache holds 48", talk(long, FRANCE, options=options, status=2))
    assert PARIS in talk(long, FRANCE, options=options, typed=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/undo"], "/undo: nothing was asked so far"),
        (["/save"], "/save: expected a file's name"),
        (["/frobnicate"], "/frobnicate is no command; /help tells them, and a space in front sends it as a question"),
        (["/load nowhere.json"], "nowhere.json: can't be read (No such file or directory)"),
        (["/load broken.json"], "broken.json: not valid JSON, so no conversation"),
        (["/load ."], ".: exists and is not a regular file"),
        (["/load list.json"], "list.json: no conversation: expected a list of messages, found {}"),
        (["/load roles.json"], "roles.json: messages[0]: expected role (system, user, assistant) and content, found "),
        (["/save roles.json"], "; it isn't replaced, name another"),
        (["/save nowhere/said.json"], "nowhere/said.json: cannot be written (No such file or directory)"),
    ],
)
def test_commands_that_are_refused(
    lines: list[str], message: str, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal they are told, and the conversation goes on; a pipe's end there."""
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("[")
    Path("list.json").write_text("{}")
    Path("roles.json").write_text('[{"role": "tool", "content": "x"}]')
    found = talk(*lines, status=2)
    assert found.startswith(PREFIX) and message in found
    assert Path("roles.json").read_text() == '[{"role": "tool", "content": "x"}]'


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),
        (['"""one', "", ' two"""', "next"], "one\n\n two"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['"""one'], "one"),
        (["\\", "你好 \\"], "\n你好 "),
    ],
)
def test_several_lines(lines: list[str], text: str) -> None:
    def read(first: bool) -> str:
        assert first is (len(left) == len(lines))
        if not left:
            raise EOFError
        return left.pop(0)

    left = list(lines)
    assert joined(read) == text


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/reset", ("reset", "")),
        ("/save  a b.json ", ("save", "a b.json")),
        ("/system one\ntwo", ("system", "one\ntwo")),
        ("/etc/passwd?", None),
        (" /help", None),
        ("1/2", None),
        ("/", None),
    ],
)
def test_commands_are_told_from_questions(text: str, command: tuple[str, str] | None) -> None:
    assert command_of(text) == command


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_are_exceptions(number: int, code: int, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends an answer, and readline puts the terminal right. In other commands this process would end."""
    monkeypatch.setattr("glm4export.commands.chat.Chat.converse", lambda chat: os.kill(os.getpid(), number))
    try:
        found: object = cli.main(["chat", str(built)])
    except SystemExit as error:
        found = error.code
    assert found == code


def test_input_that_is_no_text(built: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n"), encoding="utf-8"))
    assert fails("chat", built) == "standard input: not valid utf-8 at byte 2 of what was read"


def test_on_a_terminal(demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C ends an answer and drops what is typed, and the conversation goes on; thoughts are dim."""
    file = tmp_path / "said.json"
    command = [*GLM4EXPORT, "chat", str(demo_bundles["fp32"]), "--max-new-tokens", "1500", "--system", ADDING[0]]
    with Terminal(command) as terminal:
        terminal.wait("/help tells the commands[^>]*> ")
        terminal.type(f"{ADDING[1]}\n")
        shown = terminal.wait(r"\[.*\][^>]*> ")
        assert "\x1b[2mOnes: 2 + 5 = 7. Tens: 1 + 1 + 0 = 2.\x1b[22m\r\n\r\n12 + 15 = 27.\r\n" in shown
        pattern = r"\[\d+ prompt tokens, first token after \d+\.\d\d s, \d+ tokens at \d+\.\d tok/s, ended by stop\]"
        assert re.search(pattern, shown)
        terminal.type("not sent")
        terminal.wait("not sent")
        time.sleep(0.2)  # Python looks for signals where it waits for a key, not while it handles one
        terminal.type("\x03")
        terminal.wait("\n> ")  # the prompt behind it: Ctrl-C drops what was typed before that
        terminal.type("/undo\n/system\nMy name is\\\nAda.\nWhat is my name?\n")
        assert re.search(r"\[\d+ prompt tokens \(\d+ cached\), ", terminal.wait("Your name is Ada\\.\r\n\\[.*\\]"))
        terminal.type(f"/save {file}\n")
        terminal.wait("4 messages[^>]*> ")  # at the prompt: the end of input is a key there
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    assert json.loads(file.read_text())[0] == {"role": "user", "content": "My name is\nAda."}


def test_ctrl_c_ends_an_answer(demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    """What came of it stays in the conversation."""
    file = tmp_path / "said.json"
    command = [*GLM4EXPORT, "chat", str(demo_bundles["fp32"]), "--min-new-tokens", "1500", "--max-new-tokens", "1500"]
    with Terminal(command) as terminal:
        terminal.wait("> ")
        terminal.type("Who wrote Moby Dick?\n")
        terminal.wait("Herman")
        terminal.type("\x03")
        terminal.wait("ended by Ctrl-C")
        terminal.type(f"/save {file}\n")
        terminal.wait("2 messages[^>]*> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    assert json.loads(file.read_text())[1]["content"].startswith("Herman")
