"""A build with adapters is the build of the checkpoint that peft makes of them, and verify knows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4export import cli
from glm4runtime.contract import read_manifest, sha256_of
from tests.helpers import adapters, checkpoints
from tests.helpers.edits import edit
from tests.helpers.encoders import CLASSES, batch, output_of

SEQUENCE = "sequence-classification"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(*argv: object) -> int:
    return cli.main([str(argument) for argument in argv])


def exact(folder: Path) -> Path:
    """The adapter in numbers whose sums float32 holds exactly, whatever the order that a kernel adds them in."""
    file = folder / adapters.WEIGHTS
    tensors = load_file(file)
    save_file({name: (t * 16).round() / 16 if ".lora_" in name else t for name, t in tensors.items()}, file)
    return folder


@pytest.mark.parametrize(
    ("precision", "options"), [("fp16", []), ("int4", ["--kv-cache", "int8"])], ids=["fp16", "calibrated int4"]
)
def test_the_same_bytes_as_of_pefts_merge(precision: str, options: list[str], tmp_path: Path) -> None:
    """Stored weights, fp16's powers of two, what calibration measured: all are the merged model's."""
    model = checkpoints.random_model().to(torch.bfloat16)
    folder = checkpoints.save_with_tokenizer(model, tmp_path / "base")
    given = []
    for seed, config in enumerate(({"target_modules": "all-linear"}, {"target_modules": ["embed_tokens", "q_proj"]})):
        given.append((exact(adapters.train(model, tmp_path / f"adapter{seed}", seed, r=4, **config)), 0.5 + seed))
    merged = checkpoints.save_with_tokenizer(adapters.merge(model, given), tmp_path / "merged")
    (tmp_path / "text.txt").write_text("Theshorttextthatitiscalibratedon" * 12)
    if precision == "int4":
        options = [*options, "--calibrate", str(tmp_path / "text.txt")]
    loras = [word for adapter, scale in given for word in ("--lora", f"{adapter}:{scale}")]
    common = ("--target", "cpu", "--precision", precision, *options)
    assert run("build", folder, "-o", tmp_path / "ours", *common, *loras) == 0
    assert run("build", merged, "-o", tmp_path / "theirs", *common) == 0
    ours, theirs = (read_manifest(tmp_path / name).files for name in ("ours", "theirs"))
    for name in ("weights.bin", "prefill.onnx", "decode.onnx"):
        assert ours[name] == theirs[name], name


def test_verify_needs_the_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.random_model()
    folder = checkpoints.save(model, tmp_path / "base")
    one, two = (adapters.train(model, tmp_path / str(seed), seed, r=2, target_modules=["q_proj"]) for seed in (0, 1))
    bundle, plain = tmp_path / "bundle", tmp_path / "plain"
    build: tuple[Any, ...] = ("build", folder, "--target", "cpu", "--precision", "fp32")
    assert run(*build, "-o", bundle, "--lora", f"{one}:0.5", "--lora", two) == 0
    assert run(*build, "-o", plain) == 0
    source = json.loads((bundle / "manifest.json").read_text())["source"]
    assert source["lora.1.weights_sha256"] == sha256_of(one / adapters.WEIGHTS)
    assert source["lora.1.scale"] == "0.5" and source["lora.2.scale"] == "1.0"
    verify: tuple[Any, ...] = ("verify", bundle, "--checkpoint", folder, "--steps", 4)
    capsys.readouterr()
    assert run(*verify, "--lora", f"{one}:0.5", "--lora", two) == 0
    assert capsys.readouterr().out.endswith("passed\n")

    built = r"the bundle was built with 2 LoRA adapters \(scale 0\.5, 1\.0\)"
    place = r"of \S+ in this place\n"
    for given, message in (
        ((), rf"{built} from a local folder; name each with --lora DIR\[:SCALE\], in the order of the build\n"),
        ((f"{one}:0.5",), rf"{built}; --lora names 1\n"),
        ((one, two), rf"{re.escape(str(one))}: scale is 1\.0; {built}, {place}"),
        ((f"{two}:0.5", one), rf"{re.escape(str(two))}: weights_sha256 is \w+; {built}, {place}"),
    ):
        assert run(*verify, *(word for name in given for word in ("--lora", name))) == 2
        assert re.fullmatch(rf"glm4export: error: {message}", capsys.readouterr().err)
    assert run("verify", plain, "--checkpoint", folder, "--lora", one) == 2
    assert "the bundle was built without LoRA adapters; --lora names 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "peft_task", "tied"),
    [("sequence-classification", "SEQ_CLS", False), ("token-classification", "TOKEN_CLS", True)],
)
def test_an_adapter_that_brings_its_head(
    task: str, peft_task: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a language model, as people train them: transformers makes the head, the adapter holds it whole."""
    base = checkpoints.save(checkpoints.random_model(tie_word_embeddings=tied), tmp_path / "base")
    model = CLASSES[task].from_pretrained(base, num_labels=5).eval()
    adapter = adapters.train(
        model, tmp_path / "adapter", r=3, target_modules=["q_proj", "down_proj"], task_type=peft_task
    )
    bundle = tmp_path / "bundle"
    build = ("build", base, "-o", bundle, "--target", "cpu", "--precision", "fp32", "--lora", adapter)
    assert run(*build) == 2
    told = capsys.readouterr().err
    assert "unexpected base_model.model.score.weight [5, 64]" in told and f"build with --task {SEQUENCE}" in told
    assert run(*build, "--task", task) == 0
    assert tied or f"lm_head.weight left out, since {task} has a head of its own" in capsys.readouterr().err
    assert read_manifest(bundle).encoder.labels == tuple(f"LABEL_{index}" for index in range(5))
    theirs = adapters.apply(CLASSES[task].from_pretrained(base, num_labels=5).eval(), [(adapter, 1.0)])
    session = ort.InferenceSession(bundle / "model.onnx")
    for side in ("left", "right"):
        ids, mask = batch([6, 3, 1], side, 96)
        found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        assert np.abs(found - output_of(theirs, ids, mask).numpy()).max() <= 2e-5
    assert run("verify", bundle, "--checkpoint", base, "--lora", adapter) == 0


def test_labels_of_a_head_that_an_adapter_brings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json's, where it names as many; a head is the adapter's to bring whole and the base's to lack."""
    base = checkpoints.save(checkpoints.random_model(), tmp_path / "base")
    named = {"0": "no", "1": "yes", "2": "perhaps"}
    edit(base / "config.json", id2label=named)
    model = CLASSES[SEQUENCE].from_pretrained(base).eval()
    adapter = adapters.train(model, tmp_path / "adapter", r=3, target_modules=["q_proj"], task_type="SEQ_CLS")
    build = ("--target", "cpu", "--precision", "fp32", "--lora", adapter)
    assert run("build", base, "-o", tmp_path / "one", "--task", SEQUENCE, *build) == 0
    assert read_manifest(tmp_path / "one").encoder.labels == tuple(named.values())
    assert run("build", base, "-o", tmp_path / "two", "--task", "token-classification", *build) == 2
    assert f"{adapter}: 1 tensors do not match this model" in (told := capsys.readouterr().err)
    assert "missing base_model.model.score.bias [3]" in told
    trained = checkpoints.save(CLASSES[SEQUENCE].from_pretrained(base, num_labels=2), tmp_path / "trained")
    assert run("build", trained, "-o", tmp_path / "two", *build) == 2
    assert "mis-shaped base_model.model.score.weight: [3, 64], expected [2, 64]" in capsys.readouterr().err


def test_a_backbone_without_a_head_is_not_tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of its embedding makes no head, and one of a head has nothing to change."""
    model = checkpoints.random_model()
    base = checkpoints.save(model.model, tmp_path / "base")
    build = ("build", base, "-o", tmp_path / "bundle", "--target", "cpu", "--precision", "fp32")
    adapter = adapters.train(model, tmp_path / "one", r=2, target_modules=["embed_tokens", "q_proj"])
    assert run(*build, "--lora", adapter) == 0
    assert "lm_head" not in capsys.readouterr().err
    adapter = adapters.train(model, tmp_path / "two", r=2, target_modules=["lm_head", "q_proj"])
    assert run(*build, "--lora", adapter) == 2
    assert "unexpected base_model.model.lm_head.lora_A.weight [2, 64]" in capsys.readouterr().err


def test_an_output_in_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.random_model()
    folder = checkpoints.save(model, tmp_path / "base")
    adapter = adapters.train(model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    before = sorted(path.name for path in adapter.iterdir())
    assert run("build", folder, "-o", adapter / "out", "--target", "cpu", "--lora", adapter) == 2
    assert str(adapter) in capsys.readouterr().err
    assert sorted(path.name for path in adapter.iterdir()) == before
