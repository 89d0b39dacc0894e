"""Prepared bundles: the same numbers, one copy of the weights, and passed over where they don't fit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import BundleError, UserError, load
from glm4runtime.backends.prepare import FOLDER, prepare, prepared_graph
from glm4runtime.contract import WEIGHTS, read_manifest
from glm4runtime.folder import scratch
from tests.conftest import Build
from tests.helpers import checkpoints

PROMPT = [5, 6, 7, 8, 9, 10, 11]
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128, "vocab_size": 8192}


@pytest.fixture(scope="module")
def wide(build_bundle: Build) -> Path:
    """Large enough (some 35 MB as int4) for its weights to stand out of a process's memory."""
    return build_bundle(checkpoints.random_model(**WIDE), precision="int4", target="cpu")


def logits(bundle: Path) -> list[np.ndarray]:
    runner = load(bundle, threads=1).runner
    return [runner.prefill(PROMPT).copy(), runner.decode(12).copy(), runner.decode(13).copy()]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_same_logits_to_the_bit(precision: str, build_bundle: Build) -> None:
    geometry = {"hidden_size": 128, "intermediate_size": 256}
    bundle = build_bundle(checkpoints.random_model(**geometry), precision=precision, target="cpu")
    plain = logits(bundle)
    assert prepare(bundle, read_manifest(bundle)) == bundle / FOLDER
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is used, not passed over
        prepared = logits(bundle)
    assert all(np.array_equal(a, b) for a, b in zip(plain, prepared, strict=True))
    read_manifest(bundle, check_hashes=True)


def test_two_graphs_hold_one_copy(wide: Path) -> None:
    """PSS of both graphs against one, each in a process of its own: <= 1.1 times."""
    prepare(wide, read_manifest(wide))
    first, second = ((wide / FOLDER / name / WEIGHTS).stat() for name in ("prefill", "decode"))
    assert first.st_ino == second.st_ino
    code = """
import sys, numpy as np, onnxruntime as ort
def pss():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1])
def open_and_touch(name):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(f"{sys.argv[1]}/{name}/{name}.onnx", options)
    past = {i.name: np.zeros((1, 2, 8, 128), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    rows = {"logit_rows": np.array([[2]])} if name == "prefill" else {}
    feed = {"input_ids": np.full((1, 3), 5), "attention_mask": np.ones((1, 3), np.int64), **rows}
    session.run(["logits"], {**feed, **past})
    return session
before = pss()
one = open_and_touch("decode")
with_one = pss() - before
two = open_and_touch("prefill")
print(with_one, pss() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(wide / FOLDER)], capture_output=True, text=True, check=True, timeout=120
    )
    one, both = map(int, done.stdout.split())
    assert one > 20_000  # kB: the weights are in it
    assert both <= 1.1 * one + 12_000  # each session has some 10 MB of its own; a second copy would be 30 MB more


def test_prepared_for_something_else_is_passed_over_with_a_message(wide: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(wide, tmp_path / "bundle"))
    prepare(bundle, read_manifest(bundle))
    note = bundle / FOLDER / "prepared.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "machine": "another"}))
    with pytest.warns(UserWarning, match="prepared for another CPU, onnxruntime or build, and passed over"):
        load(bundle)


@pytest.mark.parametrize("name", ["prefill/prefill.onnx", "decode/decode.onnx", "decode/weights.bin"])
def test_prepared_files_that_were_changed(name: str, demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    """Their sizes are compared always, what they hold with check_hashes: it's them that run."""
    bundle = Path(shutil.copytree(demo_bundles["fp32"], tmp_path / "bundle"))
    file = prepare(bundle, read_manifest(bundle)) / name
    load(bundle, check_hashes=True)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        BundleError, match=r"prepared/.*: sha256 \w+, its prepared\.json says \w+; the file was changed"
    ):
        load(bundle, check_hashes=True)
    file.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"prepared/.*: {len(data) - 1} bytes, its prepared\.json says {len(data)};"):
        load(bundle)
    file.unlink()
    with pytest.raises(BundleError, match=rf"prepared/{name}: missing; its prepared\.json lists it"):
        load(bundle)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"files: key 'decode/decode\.onnx' is missing"),
        ([], r"files is \[\], expected dict"),
        ({"decode/decode.onnx": {"size": "1", "sha256": ""}}, r"files: decode/decode\.onnx: size is '1', expected int"),
    ],
)
def test_a_note_that_lists_no_files(files: Any, message: str, demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(demo_bundles["fp32"], tmp_path / "bundle"))
    note = prepare(bundle, read_manifest(bundle)) / "prepared.json"
    told = json.loads(note.read_text())
    note.write_text(json.dumps({**told, "files": files}))
    with pytest.raises(BundleError, match=rf"prepared\.json: {message}; run `glm4export prepare {bundle}` again"):
        load(bundle)
    del told["files"]  # as an earlier version left it
    note.write_text(json.dumps(told))
    with pytest.warns(UserWarning, match="prepared for another CPU, onnxruntime or build, and passed over"):
        load(bundle)


def test_preparing_again_replaces_and_leaves_nothing_behind(wide: Path) -> None:
    prepare(wide, read_manifest(wide))
    prepare(wide, read_manifest(wide))
    assert [path.name for path in wide.iterdir() if path.name.startswith((".", FOLDER))] == [FOLDER]


def test_what_a_killed_prepare_left_is_swept(wide: Path) -> None:
    """Marked folders alone: one of the user's may have the same name."""
    left, theirs = wide / ".prepared-left", wide / ".prepared-theirs"
    for folder, text in ((left, scratch._TEXT), (theirs, b"mine")):
        folder.mkdir()
        (folder / scratch.MARKER).write_bytes(text)
        (folder / "weights.bin").write_bytes(b"weights")
    prepare(wide, read_manifest(wide))
    assert not left.exists() and (theirs / "weights.bin").read_bytes() == b"weights"
    shutil.rmtree(theirs)


def test_the_mode_is_the_umasks(wide: Path) -> None:
    """A service's user reads what an administrator prepared."""
    before = os.umask(0o022)
    try:
        prepared = prepare(wide, read_manifest(wide))
    finally:
        os.umask(before)
    for path in (prepared, *prepared.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_two_at_once(wide: Path) -> None:
    """The second says what it waits for, and takes what the first made."""
    prepared = prepare(wide, read_manifest(wide))
    made = prepared.stat().st_ino
    with scratch.locked(wide, "x"):
        command = [sys.executable, "-m", "glm4export", "prepare", str(wide), "--json"]
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None and second.stdout is not None
        said = f"glm4export: waiting for another prepare or build ({wide} is locked)\n"
        assert second.stderr.readline() == said and second.poll() is None
    out, err = second.communicate(timeout=120)
    assert (second.returncode, err) == (0, "")
    assert json.loads(out) == {"bundle": str(wide), "prepared": str(prepared)}
    assert prepared.stat().st_ino == made


def test_a_file_system_without_hard_links(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(link: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "hardlink_to", refuse)
        told = (
            r"no hard links \(Operation not permitted\), so prefill and decode keep a copy .*: 0\.0\d GB more on disk"
        )
        with pytest.warns(UserWarning, match=told):
            prepared = prepare(wide, read_manifest(wide))
    first, second = (prepared / name / WEIGHTS for name in ("prefill", "decode"))
    assert first.stat().st_ino != second.stat().st_ino and first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in second.parent.iterdir()) == ["decode.onnx", WEIGHTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(wide)


@pytest.mark.parametrize("name", ["prepared.json", "prefill.onnx", WEIGHTS])
def test_a_prepared_folder_that_cannot_be_read_is_told(name: str, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that runs without it takes twice the memory."""
    prepare(wide, read_manifest(wide))
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == name and FOLDER in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    told = rf"{wide}/prepared: cannot be read \({wide}/prepared/.*{name}: Permission denied\), and passed over"
    with pytest.warns(UserWarning, match=told):
        assert prepared_graph(wide, read_manifest(wide), "prefill") is None


def test_a_damaged_note_is_told_and_none_is_not(wide: Path) -> None:
    prepared = prepare(wide, read_manifest(wide))
    for damaged in (b"{", b"[]", b"\xff", b'{"files": {}, "files": {}}', b"[" * 100_000):
        (prepared / "prepared.json").write_bytes(damaged)
        with pytest.warns(UserWarning, match="prepared: damaged, and passed over; run `glm4export prepare"):
            assert prepared_graph(wide, read_manifest(wide), "prefill") is None
    shutil.rmtree(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepared_graph(wide, read_manifest(wide), "prefill") is None


@pytest.mark.parametrize("file", ["prepared/NOTES.md", "prepared/prefill/mine.bin", "prepared"])
def test_what_is_not_prepares_own_stays(file: str, wide: Path) -> None:
    shutil.rmtree(wide / FOLDER, ignore_errors=True)
    if file == FOLDER:
        (wide / file).write_text("mine")
        told = "exists and is not a folder; move it elsewhere"
    else:
        prepare(wide, read_manifest(wide))
        (wide / file).write_text("mine")
        told = f"{file} was not made by prepare; move it elsewhere and run again"
    with pytest.raises(UserError, match=told):
        prepare(wide, read_manifest(wide))
    assert (wide / file).read_text() == "mine"
    (wide / file).unlink()


def test_a_graph_that_onnxruntime_cannot_prepare_is_one_message(wide: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(wide, tmp_path / "bundle", ignore=shutil.ignore_patterns(FOLDER)))
    (bundle / "prefill.onnx").write_bytes(b"\xff" * 10)
    with pytest.raises(UserError, match=r"prefill\.onnx: onnxruntime cannot prepare it: "):
        prepare(bundle, read_manifest(wide))
    assert not [path for path in bundle.iterdir() if "prepared" in path.name]


SIGNALLED = """
import os, signal, sys, threading
from glm4export import cli
from glm4runtime.backends import prepare

def busy(*arguments, **named):
    os.kill(os.getpid(), int(sys.argv[1]))
    threading.Event().wait()  # as one long call does

prepare.ort.InferenceSession = busy
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background of a shell ignores it
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_signals(number: int, wide: Path) -> None:
    """They don't wait for onnxruntime's long call, and leave nothing."""
    shutil.rmtree(wide / FOLDER, ignore_errors=True)
    before = sorted(wide.rglob("*"))
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), "prepare", str(wide)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (128 + number, 1, "")
    assert sorted(wide.rglob("*")) == before


def test_only_cpu_bundles_are_prepared(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(), precision="fp16", target="cuda")
    with pytest.raises(UserError, match="built for cuda; only cpu bundles are prepared"):
        prepare(bundle, read_manifest(bundle))
