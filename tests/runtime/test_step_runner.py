"""Sessions on a step graph in ONNX Runtime: what the prefill and decode graphs' session gives, by another graph."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi import onnxruntime_inference_collection as ort_collection

from glm4export import cli
from glm4export.sources.checkpoint import locate
from glm4runtime import SamplingParams, Session, UserError, load
from glm4runtime.backends import ort, ort_step
from glm4runtime.backends.cache import Buffer
from glm4runtime.backends.ort_step import provider_options
from glm4runtime.contract import read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.walk import TOLERANCE, check_walk

PROMPTS: list[dict[str, Any]] = json.loads((locate(None).folder / "prompts.json").read_text(encoding="utf-8"))
REPEATING = "the whale and the sea and the whale and the sea and the whale and"


@pytest.fixture(scope="session")
def step_bundle(build_bundle: Build) -> Path:
    """The embedded model for TensorRT, in fp32."""
    return build_bundle(None, precision="fp32", target="tensorrt", max_seq_len=512)


@pytest.fixture(scope="module")
def step(step_bundle: Path) -> Session:
    return load(step_bundle, provider="cpu", prefill_chunk=32)


@pytest.fixture(scope="module")
def small(build_bundle: Build) -> Path:
    """A random model with room for 64 tokens."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=31)
    return build_bundle(model, precision="fp32", target="tensorrt")


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[5], PROMPTS[11], PROMPTS[30]], ids=lambda p: str(p)[:30])
def test_the_chats_of_the_other_graphs(
    prompt: dict[str, Any], step: Session, demo_sessions: dict[str, Session]
) -> None:
    messages = prompt["messages"] if "messages" in prompt else [{"role": "user", "content": prompt["prompt"]}]
    texts = [session.chat(messages) for session in (step, demo_sessions["fp32"])]
    ids = [list(text.generation) for text in texts]
    assert ids[0] == ids[1] and len(ids[0]) > 3


@pytest.mark.parametrize("prompt", [REPEATING, "It was a dark night at sea, and"])
def test_greedy_tokens_with_and_without_lookup(prompt: str, step: Session, demo_sessions: dict[str, Session]) -> None:
    params = SamplingParams(max_new_tokens=120)
    wanted = list(demo_sessions["fp32"].generate(prompt, params))
    assert list(step.generate(prompt, params)) == wanted
    accepted = []
    for limit in (0, 1, 2, 3, 7, 15):
        generation = step.generate(prompt, params, lookup=limit)
        assert list(generation) == wanted
        accepted.append(generation.lookup.accepted)
    assert accepted[0] == 0 and accepted[-1] > 60


def test_any_order_of_calls_gives_the_other_graphs_logits(small: Path, build_bundle: Build) -> None:
    """Prefills in chunks of 5, decode steps, drafts partly accepted and rewinds, up to the cache's last row."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=31)
    reference = load(build_bundle(model, precision="fp32", target="cpu")).runner
    runner = load(small, provider="cpu", prefill_chunk=5).runner
    for seed in range(6):
        assert len(check_walk(runner, reference, np.random.default_rng(seed), 40)) == 4


def test_a_rewound_session_is_a_fresh_one_to_the_bit(small: Path) -> None:
    runner = load(small, provider="cpu").runner
    fresh = [runner.prefill([5, 6, 7]).copy(), runner.decode(8).copy(), runner.verify([9, 10]).copy()]
    runner.rewind()
    runner.prefill(list(range(30)))
    runner.verify([11] * 16)
    runner.rewind(12)
    runner.decode(4)
    runner.rewind()
    again = [runner.prefill([5, 6, 7]).copy(), runner.decode(8).copy(), runner.verify([9, 10]).copy()]
    assert [row.tobytes() for row in again] == [row.tobytes() for row in fresh]


def test_what_was_looked_at_is_gone_after_a_prompt(small: Path) -> None:
    runner = load(small, provider="cpu").runner
    runner.verify([5, 6])
    runner.prefill([7])
    with pytest.raises(ValueError, match="no verified token is left"):
        runner.accept()


def test_a_full_cache(small: Path) -> None:
    runner = load(small, provider="cpu", max_seq_len=12).runner
    with pytest.raises(UserError, match="the prompt needs 13 tokens, the cache holds 12; shorten it"):
        runner.prefill([5] * 13)
    runner.prefill([5] * 11)
    with pytest.raises(UserError, match="the cache has no room for 2 tokens behind 11: it holds 12"):
        runner.verify([5, 6])
    runner.decode(5)
    with pytest.raises(UserError, match="the cache is full: it holds 12 tokens"):
        runner.decode(5)
    with pytest.raises(UserError, match=r"max_seq_len=65 is not in 1\.\.64"):
        load(small, provider="cpu", max_seq_len=65)


def test_a_decode_step_binds_and_allocates_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(small, provider="cpu").runner
    runner.prefill([5, 6, 7])
    runner.decode(8)
    monkeypatch.setattr(Buffer, "bind_input", None)
    monkeypatch.setattr(Buffer, "bind_output", None)
    monkeypatch.setattr(Buffer, "__init__", None)
    runner.decode(9)
    assert runner.length == 5


# What runs a bundle


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert cli.main([str(argument) for argument in argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        (
            None,
            r"no engine in the bundle \(`glm4export engine` builds one, .*\); `--provider cpu` runs the same graph in",
        ),
        ("engine", r"no engine in the bundle \(.*\); `--provider cpu` runs the same graph"),
        ("cuda", r"CUDAExecutionProvider is not in the installed onnxruntime .*; pip install '\.\[gpu\]'"),
        ("tensorrt", r"TensorrtExecutionProvider is not in .*; pip install '\.\[gpu-tensorrt\]'"),
        ("tensorrt-rtx", "NvTensorRTRTXExecutionProvider (is not installed; pip install|could not be loaded: )"),
    ],
)
def test_providers_that_cannot_run_here(
    provider: str | None, message: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--provider", provider] if provider else []
    found = fails(capsys, "generate", small, "--raw", "--prompt", "x", *options)
    assert re.search(message, found) and found.count("\n") == 1


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx", "engine"])
def test_other_bundles_run_on_no_tensorrt(provider: str, demo_bundles: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"provider '{provider}' runs bundles built with `--target tensorrt`; .* cpu"):
        load(demo_bundles["fp32"], provider=provider)
    with pytest.raises(UserError, match="provider 'gpu' is not known; known: cpu, cuda, tensorrt, tensorrt-rtx,"):
        load(demo_bundles["fp32"], provider="gpu")


def test_verify_and_bench_run_step_graphs(step_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(step_bundle), "--provider", "cpu", "--steps", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "tensorrt" and max(phase["max_abs"] for phase in report["phases"]) <= TOLERANCE
    quick = ("--prefill", "8", "--decode-context", "4", "--steps", "2", "--repeats", "1")
    assert "--batch 2: bundles for tensorrt are measured with one sequence; leave it out" in fails(
        capsys, "bench", step_bundle, "--provider", "cpu", *quick, "--batch", "1,2"
    )


@pytest.mark.parametrize(("provider", "prefix"), [("tensorrt", "trt"), ("tensorrt-rtx", "nv")])
def test_shapes_told_to_onnxruntimes_tensorrt(provider: str, prefix: str, small: Path, tmp_path: Path) -> None:
    """Every input of the graph with its rank and static dims, from one token to the longest run."""
    manifest = read_manifest(small)
    options = provider_options(tmp_path, manifest.cache, provider, 48)
    for end, sizes in {
        "min": {"batch": 1, "seq": 1, "rows": 1},
        "opt": {"batch": 1, "seq": 1, "rows": 1},
        "max": {"batch": 1, "seq": 48, "rows": 16},
    }.items():
        told = dict(entry.split(":") for entry in options[f"{prefix}_profile_{end}_shapes"].split(","))
        assert told == {
            spec.name: "x".join(str(sizes[dim] if isinstance(dim, str) else dim) for dim in spec.dims)
            for spec in manifest.graphs["step"].inputs
        }
    folder = tmp_path / "engines" / f"onnxruntime-{provider}"
    assert folder.is_dir() and str(folder) in options.values()
    (tmp_path / "file").touch()
    assert str(tmp_path) not in str(provider_options(tmp_path / "file", manifest.cache, provider, 48))
    assert provider_options(tmp_path, manifest.cache, "cuda", 48)["arena_extend_strategy"] == "kSameAsRequested"


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_what_devices_take(target: str, build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged inputs, uploads, a cache that is cleared: the code of devices, on memory that ONNX Runtime owns."""
    bundle = build_bundle(checkpoints.random_model(eos_token_id=[1], vocab_size=31), precision="fp32", target=target)
    wanted = load(bundle, provider="cpu", prefill_chunk=5).runner
    on_cpu = ort_collection.OrtDevice.make("cpu", 0)
    monkeypatch.setattr(ort_collection.OrtDevice, "make", lambda name, *ids: on_cpu)
    for module in (ort, ort_step):
        monkeypatch.setattr(module, "device_of", lambda provider: "cuda")
    runner = load(bundle, provider="cpu", prefill_chunk=5).runner
    assert runner.device == "cuda" and not hasattr(runner._cache._buffers[0, "key"], "array")
    assert len(check_walk(runner, wanted, np.random.default_rng(0), 40)) == 4


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", np.uint16), ("bool", np.bool_), ("int64", np.int64)])
def test_a_buffer_off_the_cpu(dtype: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy has no bfloat16: the memory is that of numbers of its size, and graphs are told what it is."""
    on_cpu = ort_collection.OrtDevice.make("cpu", 0)
    monkeypatch.setattr(ort_collection.OrtDevice, "make", lambda name, *ids: on_cpu)
    buffer = Buffer((2, 3), dtype, "cuda")
    buffer.host[...] = [[1, 0, 1], [0, 1, 1]]
    assert buffer.host.dtype == stored and buffer.dtype == (16 if dtype == "bfloat16" else stored)
    buffer.upload()
    assert buffer._value.numpy().tolist() == buffer.host.tolist()
    buffer.clear()
    assert not buffer._value.numpy().any()
