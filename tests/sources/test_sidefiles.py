"""Tokenizer, template and their kin are looked at before a build; none of them can take it down."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from glm4export.sources import sidefiles
from glm4export.sources.checkpoint import SIDE_FILES, locate
from glm4export.sources.sidefiles import check_side_files
from glm4runtime.contract import BundleError, UserError
from tests.helpers.sidefiles import PANIC, POINTER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The side files of the embedded model."""
    for name in SIDE_FILES:
        shutil.copy(locate(None).folder / name, tmp_path / name)
    return tmp_path


def change_tokenizer(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_git_lfs_pointer_is_told(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"^{folder}/{name}: a git-lfs pointer, not the file; run `git lfs pull` "):
        check_side_files(folder)


def test_side_files_may_be_missing(tmp_path: Path) -> None:
    check_side_files(tmp_path)


def test_a_tokenizer_that_panics_is_refused(folder: Path) -> None:
    change_tokenizer(folder, normalizer=PANIC)
    with pytest.raises(UserError, match=rf"^{folder}/tokenizer\.json: ") as caught:
        check_side_files(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_the_runtime_refuses_is_refused_in_its_words(folder: Path) -> None:
    change_tokenizer(folder, decoder=None)
    with pytest.raises(UserError, match=r"tokenizer\.json: expected a BPE model with a ByteLevel decoder, as GLM-4's"):
        check_side_files(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises((UserError, BundleError), match=r"tokenizer\.json: not a readable tokenizer\.json"):
        check_side_files(folder)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (
            "import os; os.abort()",
            r"`tokenizers` can't load the file and ends its process \(signal 6\); fetch it again",
        ),
        ("import sys; sys.exit(101)", r".* ends its process \(status 101\)"),
        ("raise MemoryError('so much')", r".* ends its process \(MemoryError: so much\)"),
        ("while True: pass", r"not loaded within 0\.2 s; fetch the file again"),
    ],
)
def test_what_ends_the_process_that_loads_it(
    probe: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidefiles, "_PROBE", probe)
    monkeypatch.setattr(sidefiles, "_loaded", set())
    monkeypatch.setattr(sidefiles, "_SECONDS", 0.2 if "while" in probe else 60)
    with pytest.raises(UserError, match=rf"^{folder}/tokenizer\.json: {message}"):
        check_side_files(folder)


def test_a_good_tokenizer_is_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidefiles, "_loaded", set())
    check_side_files(folder)

    def run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loaded again")

    monkeypatch.setattr(subprocess, "run", run)
    check_side_files(folder)
