"""Whole builds: reproducible to the byte, and whole files in the bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm4export.build.options import BuildOptions
from glm4export.build.targets import detect_target
from glm4runtime import SamplingParams, UserError, load
from glm4runtime.contract import read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_builds_are_byte_identical(precision: str, build_bundle: Build, tmp_path: Path) -> None:
    """Across processes too: another hash seed must not reorder anything."""
    folder = checkpoints.save(checkpoints.random_model(), tmp_path / "checkpoint")
    first = build_bundle(folder, precision=precision, target="cpu")
    command = [sys.executable, "-m", "glm4export", "build", str(folder), "-o", str(tmp_path / "second")]
    subprocess.run(
        [*command, "--precision", precision, "--target", "cpu"], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}
    )
    assert contents(first) == contents(tmp_path / "second")


def test_the_manifest_lists_every_file_and_no_local_path(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(), precision="fp16", target="cuda")
    manifest = read_manifest(bundle, check_hashes=True)
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, "manifest.json"}
    assert manifest.target == "cuda" and manifest.cache.dtype == "float16"
    assert manifest.tokens.eos == (1, 2, 3)
    for path in bundle.iterdir():
        assert str(bundle.parent).encode() not in path.read_bytes(), path
    assert manifest.graphs["decode"].output("logits").dims == ("batch", "seq", 96)
    assert manifest.graphs["prefill"].output("logits").dims == ("batch", "rows", 96)


def test_sampling_is_seeded_and_prompts_may_be_chunked(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(eos_token_id=[95]), precision="fp32", target="cpu")
    prompt = np.random.default_rng(0).integers(0, 90, 20).tolist()
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_new_tokens=12)
    whole, chunked = load(bundle), load(bundle, prefill_chunk=6)
    assert list(whole.generate(prompt, params)) == list(chunked.generate(prompt, params))


def test_generation_ends_at_the_token_limit_the_cache_or_a_stop_token(build_bundle: Build) -> None:
    model = checkpoints.random_model(eos_token_id=[95])
    session = load(build_bundle(model, precision="fp32", target="cpu"), max_seq_len=10)
    generation = session.generate([5, 6, 7], SamplingParams(max_new_tokens=4))
    tokens = list(generation)
    assert (len(tokens), generation.finish_reason, generation.prompt_tokens) == (4, "length", 3)
    generation = session.generate([5, 6, 7])
    assert (len(list(generation)), generation.finish_reason) == (8, "length")  # 3 + 7 in the cache, one more chosen
    stopped = type(generation)(session.runner, [5, 6, 7], SamplingParams(), stop=[tokens[2]])
    assert (list(stopped), stopped.finish_reason, stopped.stop_token) == (
        tokens[: tokens.index(tokens[2])],
        "stop",
        tokens[2],
    )


def test_a_second_generation_takes_the_cache(build_bundle: Build) -> None:
    session = load(build_bundle(checkpoints.random_model(eos_token_id=[95]), precision="fp32", target="cpu"))
    first = session.generate([5, 6, 7])
    next(first)
    list(session.generate([8, 9], SamplingParams(max_new_tokens=3)))
    with pytest.raises(RuntimeError, match="another generation was started"):
        next(first)


def test_auto_target_is_cpu_without_a_gpu() -> None:
    assert Path("/dev/nvidia0").exists() or detect_target() == "cpu"


def test_bf16_is_built_for_cuda_and_refused_for_cpu_with_the_remedy(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(), precision="bf16", target="cuda")
    manifest = read_manifest(bundle)
    assert manifest.cache.dtype == "bfloat16"
    assert {spec.dtype for spec in manifest.graphs["decode"].inputs[2:]} == {"bfloat16"}
    assert manifest.graphs["decode"].output("logits").dtype == "float32"
    with pytest.raises(
        UserError, match=r"bf16 does not run on --target cpu; it runs fp32, fp16, int8, int4\..*build fp32"
    ):
        BuildOptions("bf16", "cpu")


def test_fp32_is_refused_for_cuda_whose_attention_kernel_has_none() -> None:
    with pytest.raises(
        UserError,
        match=r"fp32 does not run on --target cuda; it runs fp16, bf16, int8, int4\. .*build bf16",
    ):
        BuildOptions("fp32", "cuda")
