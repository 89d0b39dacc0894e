"""Prepared bundles: the same numbers, one copy of the weights, and passed over where they don't fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import BundleError, UserError, load
from glm4runtime.contract import WEIGHTS, read_manifest
from glm4runtime.prepare import FOLDER, prepare

from . import checkpoints
from .conftest import Build

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
    session.run(["logits"], {"input_ids": np.full((1, 3), 5), "attention_mask": np.ones((1, 3), np.int64), **past})
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


def test_only_cpu_bundles_are_prepared(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(), precision="fp16", target="cuda")
    with pytest.raises(UserError, match="built for cuda; only cpu bundles are prepared"):
        prepare(bundle, read_manifest(bundle))
