"""What errors show of somebody's files: short, and nothing that a terminal would obey."""

from __future__ import annotations

import pytest

from glm4export import cli
from glm4export.terminal.errors import listed, message_text, printable, printable_lines
from glm4runtime.contract import shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, 模型 é", "plain, 模型 é"),
        ("\x1b[2J\x07\r\n", r"\x1b[2J\x07\r\n"),
        ("\u202egpj.exe\x9b", r"\u202egpj.exe\x9b"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("x" * 3000, "x" * 2000 + " … and 1000 characters more"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_line_breaks_of_a_message_stay() -> None:
    assert printable_lines("a\n  b\x1b[0m\n") == "a\n  b\\x1b[0m\n"


def test_a_list_is_cut_and_counted() -> None:
    assert listed(["a\nb", "c"]) == "a\\nb\n  c"
    assert listed(["x"] * 3001).count("\n") == 20 and listed(["x"] * 3001).endswith("\n  … and 2981 more")
    assert listed(["x"], 2**31) == "x\n  … and 2147483647 more"


def test_a_long_message_is_cut_and_counted() -> None:
    lines = message_text("heading\x1b\n" + "line\n" * 3000).split("\n")
    assert (len(lines), lines[0], lines[-1]) == (41, r"heading\x1b", "… and 2962 lines more")
    assert message_text("a\n  b") == "a\n  b"


def test_values_are_shown_short() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[[[[[[[...]]]]]]]"
    assert len(shown("\x1b" * 10**6)) < 200 and "\x1b" not in shown("\x1b")
    assert shown(10**400) == "1000000000...00000000000"
    assert shown(list(range(100))) == "[0, 1, 2, 3, 4, 5, ...]"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_no_control_code_of_a_path_reaches_the_terminal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "/nowhere/\x1b]0;owned\x07", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(r"glm4export: error: /nowhere/\x1b]0;owned\x07: no such folder, and not a hub id")
