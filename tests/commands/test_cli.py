"""The command line: argparse's mistakes, ``--help``, streams, missing packages; never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm4export import cli
from glm4runtime.contract import MANIFEST
from tests.helpers.processes import GLM4EXPORT, PREFIX, WITHOUT, python


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"the following arguments are required: COMMAND"),
        (["compile"], r"argument COMMAND: invalid choice: 'compile'"),
        (["build", "--precision", "int3"], r"argument --precision: invalid choice: 'int3'"),
        (["build", "--target", "tpu"], r"argument --target: invalid choice: 'tpu'"),
        (["build", "--max-seq-len", "many"], r"argument --max-seq-len: invalid int value: 'many'"),
        (["generate", "b"], r"the following arguments are required: --prompt"),
        (["batch", "b", "requests"], r"the following arguments are required: -o/--output"),
        (["verify"], r"the following arguments are required: BUNDLE"),
        (["inspect", "a", "b"], r"unrecognized arguments: b"),
    ],
)
def test_argparse_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert re.search(rf"glm4export.*: error: {message}", capsys.readouterr().err)


HELP = """
import io, sys, time
start = time.process_time()
from contextlib import redirect_stdout
from glm4export.cli import main
texts = {}
for command in ([], ["build"], ["generate"], ["chat"], ["batch"], ["verify"], ["inspect"], ["prepare"], ["bench"]):
    with redirect_stdout(io.StringIO()) as text:
        try:
            main([*command, "--help"])
        except SystemExit as error:
            assert error.code == 0
    texts[" ".join(command)] = text.getvalue()
heavy = {"torch", "onnx", "onnxruntime", "numpy", "tokenizers", "jinja2", "transformers", "huggingface_hub"}
import json
print(json.dumps({"texts": texts, "heavy": sorted(heavy & set(sys.modules)), "seconds": time.process_time() - start}))
"""


def test_help_is_instant_and_shows_an_example() -> None:
    done = python(HELP)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == [] and found["seconds"] < 0.5
    for command, text in found["texts"].items():
        assert re.search(rf"example: +glm4export +{command}", text), text


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "{built}"]])
def test_a_reader_that_goes_away(argv: list[str], built: Path) -> None:
    """As ``| head`` does: no traceback, and no complaint at exit."""
    read, write = os.pipe()
    os.close(read)
    command = [*GLM4EXPORT, *(argument.format(built=built) for argument in argv)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.stderr == "" and done.returncode == 1


def test_no_standard_output_at_all(built: Path) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *GLM4EXPORT, "inspect", str(built)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("blocked", "command", "extra"),
    [
        ("torch", ["build", "{source}"], "compile"),
        ("onnxscript", ["build", "{source}"], "compile"),
        ("onnxruntime", ["generate", "{built}", "--prompt", "x"], "cpu"),
        ("torch", ["verify", "{built}"], "compile"),
        ("onnx", ["inspect", "{built}"], "compile"),
    ],
)
def test_a_missing_extra_is_named(blocked: str, command: list[str], extra: str, built: Path, source: Path) -> None:
    argv = [argument.format(built=built, source=source) for argument in command]
    done = python(WITHOUT, blocked, *argv)
    assert done.returncode == 2, done.stderr
    install = f"pip install '.[{extra}]' in a clone of glm4export's repository"
    assert done.stderr == f"{PREFIX}{blocked} is not installed; {install}\n"


def test_building_needs_no_onnxruntime(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python(WITHOUT, "onnxruntime", "build", source, "-o", out, "--precision", "fp32")
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / MANIFEST).is_file()


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "glm4export", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("glm4export: error: ") and "No space left on device" in done.stderr
