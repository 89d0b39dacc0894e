"""A checkpoint and its bundle, to read or to damage, and commands that must fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4export import cli
from glm4export.sources.turns import TURN_TOKENS
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.processes import PREFIX
from tests.helpers.tokenizers import make_raw

TEMPLATE = "[gMASK]<sop>{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}"
EOS = [make_raw().token_to_id(text) for text in TURN_TOKENS]
Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail; returns its message, without the prefix."""

    def run(*argv: object, lines: int = 1) -> str:
        assert cli.main([str(argument) for argument in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(PREFIX) and captured.err.count("\n") == lines, captured.err
        return captured.err.removeprefix(PREFIX).rstrip("\n")

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer and a template."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    checkpoints.save(checkpoints.random_model(vocab_size=420, eos_token_id=EOS), folder)
    make_raw().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def built(build_bundle: Build, source: Path) -> Path:
    return build_bundle(source, precision="fp32", target="cpu")


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may damage."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that the test may damage."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))
