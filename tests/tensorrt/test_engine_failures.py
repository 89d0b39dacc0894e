"""Everything that can go wrong on the way to an engine: one clear line, no half engine, no process left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from glm4export import cli
from glm4export.bundle.swap import OutputError
from glm4export.tensorrt import engines
from glm4export.tensorrt.engines import add_engines
from glm4export.tensorrt.network import Log, require_fused
from glm4export.tensorrt.worker import Job
from glm4runtime.contract import BundleError, UserError, read_manifest
from glm4runtime.contract.engine_spec import Profile, read_engine_specs
from tests.helpers.engine_builds import builder, contents

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cpu", "--compute-capability", "8.9"], "--compute-capability goes with --target tensorrt, not"),
        (["--target", "cpu", "--engine", "none"], "--engine goes with --target tensorrt, not with cpu"),
        (["--compute-capability", "7.0"], "--compute-capability 7.0: tensorrt-rtx builds for 7.5, 8.0, 8.6, 8.9, "),
        (["--compute-capability", "SM89"], "--compute-capability SM89: tensorrt-rtx builds for 7.5"),
        ([], "no GPU here to build an engine for: name the GPU's compute capability with --compute-ca"),
        (["--engine", "tensorrt"], "tensorrt is not installed; pip install '.[tensorrt]'"),
        (["--compute-capability", "8.9", "--prefill-chunk", "0"], "--prefill-chunk 0: expected at least 1"),
        (["--compute-capability", "8.9", "--prefill-chunk", "-1"], "--prefill-chunk -1: expected at least 1"),
        (["--compute-capability", "8.9", "--max-batch", "0"], "--max-batch 0: expected 1 to 256 sequences"),
        (["--compute-capability", "8.9", "--max-batch", "257"], "--max-batch 257: expected 1 to 256 sequences"),
        (["--compute-capability", "8.9", "--workspace", "0"], "--workspace 0: expected more than 0 GB"),
        (["--compute-capability", "8.9", "--timing-cache", "x"], "--timing-cache is not something that tensorrt-rtx"),
        (["--compute-capability", "8.9", "--version-compatible"], "--version-compatible is not something that tens"),
    ],
)  # fmt: skip
def test_mistakes(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engines, "gpu_capability", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    target = [] if "--target" in options else ["--target", "tensorrt"]
    assert cli.main(["build", "-o", str(tmp_path / "out"), *target, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"glm4export: error: {message}") and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ([], "neither tensorrt nor tensorrt_rtx is installed; pip install '.[tensorrt-rtx]'"),
        (["--engine", "tensorrt-rtx"], "tensorrt_rtx is not installed; pip install '.[tensorrt-rtx]'"),
    ],
)
def test_without_a_module(
    engine: list[str], message: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    for argv in (["build", "-o", str(bundle) + "2", "--target", "tensorrt"], ["engine", str(bundle)]):
        assert cli.main([*argv, *engine]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"glm4export: error: {message}") and captured.err.count("\n") == 1


def test_engines_need_a_tensorrt_bundle(demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engine", str(demo_bundles["fp16"]), "--compute-capability", "8.9"]) == 2
    assert "built for cpu; engines are made of bundles for --target tensorrt" in capsys.readouterr().err


def test_a_parser_error_names_node_and_layer(bundle: Path, job: Job) -> None:
    path = bundle / "step.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.name.startswith("model.layers.2.") and node.op_type == "Mul")
    node.op_type = "BitwiseXor"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=rf"can't take node '{node.name}' \(BitwiseXor\) of model\.layers\.2: "):
        engines.run(job, lambda phase: None)


def test_a_graph_that_is_none(bundle: Path, job: Job) -> None:
    (bundle / "step.onnx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="TensorRT can't take the graph as a whole: "):
        engines.run(job, lambda phase: None)


def test_what_tensorrt_cannot_compile_is_told(job: Job) -> None:
    """A profile of up to 32 tokens: the compiler's own error, which the flavour's profiles keep clear of."""
    job = replace(job, profiles=(Profile("step", (1, 1, 1), (1, 1, 32), (1, 1, 16)),))
    with pytest.raises(
        UserError, match=r"tensorrt-rtx 1\.\S+ could not build the engine: .*more than one op named"
    ) as told:
        engines.run(job, lambda phase: None)
    assert "\n" not in str(told.value) and Log.HARMLESS not in str(told.value)


def test_attention_that_was_not_recognised() -> None:
    require_fused({"ATTENTION_OUTPUT": 3, "ROTARY_EMBEDDING": 6, "KV_CACHE_UPDATE": 6, "CAST": 1}, 3, "standard")
    with pytest.raises(UserError, match=r"recognised 5 of 6 kv cache update layers; .*upgrade it"):
        require_fused({"ATTENTION_OUTPUT": 3, "ROTARY_EMBEDDING": 6, "KV_CACHE_UPDATE": 5}, 3, "standard")
    with pytest.raises(UserError, match="recognised 0 of 3 attention output layers"):
        require_fused({"ROTARY_EMBEDDING": 6, "KV_CACHE_UPDATE": 6}, 3, "standard")


def test_a_full_disk(job: Job) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        engines.run(replace(job, engine="/dev/full"), lambda phase: None)


def test_a_worker_that_is_killed_or_dies(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = watch_workers(monkeypatch)
    with pytest.raises(UserError, match=r"the building process was killed, as the kernel does when memory runs out"):
        engines.run(job, lambda phase: processes[-1].kill())
    with pytest.raises(UserError, match=r"the building process ended with status -11"):
        engines.run(job, lambda phase: processes[-1].send_signal(signal.SIGSEGV))
    with pytest.raises(UserError, match=r"ended with status 1; its last words: KeyError: 'nothing'"):
        engines.run(replace(job, flavour="nothing"), lambda phase: None)
    assert all(process.returncode is not None for process in processes)


def watch_workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(engines.subprocess, "Popen", start)
    return started


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_build_ends_at_once(
    error: type[BaseException], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, processes = contents(bundle), watch_workers(monkeypatch)

    @contextmanager
    def show(name: str) -> Iterator[Callable[[str], None]]:
        def phase(what: str) -> None:
            raise error

        yield phase

    with pytest.raises(error):
        add_engines(bundle, builder(show))
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert contents(bundle) == before and [path.name for path in bundle.parent.iterdir()] == ["bundle"]


SIGNALLED = """
import os, signal, subprocess, sys
from contextlib import contextmanager
from glm4export import cli
from glm4export.tensorrt import engines
from glm4export.terminal import progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background of a shell ignores it
popen = subprocess.Popen

def start(*arguments, **options):
    process = popen(*arguments, **options)
    print(process.pid, flush=True)
    return process

engines.subprocess.Popen = start

@contextmanager
def line(name):
    yield lambda phase: os.kill(os.getpid(), int(sys.argv[1]))

progress.engine_line = line
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_signals(number: int, code: int, bundle: Path) -> None:
    before = contents(bundle)
    argv = [str(number), "engine", str(bundle), "--compute-capability", "8.9"]
    done = subprocess.run([sys.executable, "-c", SIGNALLED, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert contents(bundle) == before
    worker_id = int(done.stdout)
    for _ in range(100):  # the worker of a killed process notices by its closed standard input
        if not Path(f"/proc/{worker_id}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{worker_id}").exists()
    if number != signal.SIGKILL:  # a killed process leaves its folder for the next build to remove
        assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_that_changes_meanwhile_is_kept(bundle: Path) -> None:
    @contextmanager
    def show(name: str) -> Iterator[Callable[[str], None]]:
        yield lambda phase: None
        text = (bundle / "manifest.json").read_text()
        (bundle / "manifest.json").unlink()
        (bundle / "manifest.json").write_text(text.replace('"producer": "glm4export"', '"producer": "another"'))

    with pytest.raises(OutputError, match=r"was changed meanwhile \(manifest\.json\); run the command again"):
        add_engines(bundle, builder(show))
    assert read_manifest(bundle).producer == "another" and read_engine_specs(bundle) == []


def test_a_bundle_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        add_engines(tmp_path / "nowhere", builder())
