"""Builds of heads without a cache: from which checkpoints, in which formats, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4export import cli
from glm4export.build import build as compiler
from glm4export.sources.checkpoint import locate
from glm4export.weights.fp16 import Fp16Scales
from glm4runtime import Encoder, load_encoder
from glm4runtime.contract import MANIFEST, BundleError, UserError, read_manifest
from tests.conftest import Build
from tests.helpers.checkpoints import random_model, save
from tests.helpers.encoders import batch, output_of, random_encoder
from tests.helpers.logits import strict_session

IDS = [[5, 6, 7, 8], [9], [11, 12]]


def states(bundle: Path) -> list[np.ndarray]:
    with load_encoder(bundle, provider="cpu") as encoder:
        ask = encoder.hidden_states if encoder.manifest.task == "features" else encoder.logits
        return [rows.copy() for rows in ask(IDS)]


def renamed(folder: Path, target: Path, old: str, new: str) -> Path:
    """A copy of a checkpoint whose tensors' names begin otherwise."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = {new + name[len(old) :] if name.startswith(old) else name: t for name, t in load_file(file).items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("task", ["features", "sequence-classification", "token-classification"])
def test_names_with_and_without_the_prefix(task: str, build_bundle: Build, tmp_path: Path) -> None:
    folder = save(random_encoder(task), tmp_path / "saved")
    has = any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    assert has == (task != "features")
    if has:
        other = renamed(folder, tmp_path / "other", "model.", "")
    else:
        other = renamed(folder, tmp_path / "other", "", "model.")
    one, two = (build_bundle(each, precision="fp16", target="cpu") for each in (folder, other))
    assert (one / "weights.bin").read_bytes() == (two / "weights.bin").read_bytes()
    assert (one / "model.onnx").read_bytes() == (two / "model.onnx").read_bytes()


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "token-classification"])
def test_features_of_any_checkpoint(
    task: str, build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model() if task == "causal-lm" else random_encoder(task)
    folder = save(model, tmp_path)
    bundle = build_bundle(folder, precision="fp32", target="cpu", task="features")
    unused = {"causal-lm": "lm_head.weight", "token-classification": "score.weight, score.bias"}.get(
        task, "score.weight"
    )
    assert f"note: {folder}: {unused} left out, since features needs no head" in capsys.readouterr().err
    for ids, found in zip(IDS, states(bundle), strict=True):
        with torch.no_grad():
            assert np.abs(found - model.model(torch.tensor([ids]))[0][0].numpy()).max() <= 2e-5
    assert cli.main(["verify", str(bundle), "--checkpoint", str(folder), "--max-kl", "1"]) == 2
    assert f"--max-kl compares labels, and {bundle} has none to choose from; leave it out" in capsys.readouterr().err


def test_a_tied_checkpoint_of_a_language_model_needs_no_head(build_bundle: Build, tmp_path: Path) -> None:
    folder = save(random_model(tie_word_embeddings=True), tmp_path)
    assert len(states(build_bundle(folder, precision="fp32", target="cpu", task="features"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "sequence-classification"},
            "no score.weight, the head of sequence-classification: a checkpoint that",
        ),
        ({"task": "token-classification"}, "no score.weight, .* for embeddings build --task features"),
        (
            {"task": "features", "prefill_precision": "int8", "precision": "int8"},
            "--prefill-precision goes with --task",
        ),
        ({"task": "features", "kv_cache": "fp32"}, "--kv-cache goes with --task causal-lm, not with features; build"),
        ({"task": "features", "calibrate": Path("a"), "precision": "int8"}, "--calibrate goes with --task causal-lm"),
        (
            {"task": "features", "calibrate": Path("a"), "precision": "fp8", "target": "tensorrt"},
            "--precision fp8, which needs --calibrate, goes with --task causal-lm, not with features; build without it",
        ),
        (
            {"task": "features", "attention": "plugin", "precision": "fp16", "target": "tensorrt"},
            "--attention plugin goes with --task causal-lm, not with features",
        ),
        ({"task": "features", "head_bits": 4, "precision": "int4"}, "--head-bits goes with --task causal-lm, not with"),
        ({"pooling": "mean"}, "--pooling mean goes with --task features, not with causal-lm"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, build_bundle: Build, tmp_path: Path) -> None:
    folder = save(random_model(), tmp_path)
    with pytest.raises(UserError, match=message):
        build_bundle(folder, **{"precision": "fp32", "target": "cpu", **options})


def test_a_classifier_of_another_kind(build_bundle: Build, tmp_path: Path) -> None:
    folder = save(random_encoder("sequence-classification"), tmp_path)
    with pytest.raises(UserError, match=r"1 tensors do not match config.json.*\n  missing score.bias \[3\]"):
        build_bundle(folder, precision="fp32", target="cpu", task="token-classification")
    path = folder / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(UserError, match=r"mis-shaped score.weight: \[3, 64\], expected \[2, 64\]"):
        build_bundle(folder, precision="fp32", target="cpu")


@pytest.mark.parametrize("task", ["features", "sequence-classification", "token-classification"])
def test_what_leaves_a_rescaled_graph_is_what_would_have(
    task: str, build_bundle: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is scaled by r, and its last norm divides by what it finds: nothing is left to be undone."""
    folder = save(random_encoder(task), tmp_path)
    plain = build_bundle(folder, precision="fp32", target="cpu")
    compile_graph, scales = compiler.compile_graph, Fp16Scales(2.0**-7, 2.0**-3)
    monkeypatch.setattr(
        compiler, "compile_graph", lambda *args, **given: compile_graph(*args, **given | {"scales": scales})
    )
    rescaled = build_bundle(folder, precision="fp32", target="cpu")
    assert (rescaled / "weights.bin").read_bytes() != (plain / "weights.bin").read_bytes()
    for found, wanted in zip(states(rescaled), states(plain), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_a_loud_stream_stays_finite_in_fp16(build_bundle: Build, tmp_path: Path) -> None:
    model = random_encoder("token-classification")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_mlp_layernorm.weight *= 20000
    bundle = build_bundle(save(model, tmp_path), precision="fp16", target="cpu")
    ids, mask = batch([7, 3], "left", 96)
    found = strict_session(bundle / "model.onnx").run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[
        0
    ]
    wanted = output_of(model, ids, mask).numpy()
    assert np.isfinite(found).all() and (found.argmax(-1) == wanted.argmax(-1))[mask.bool().numpy()].all()


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a random head of four labels."""
    source, folder = locate(None).folder, tmp_path_factory.mktemp("tagger") / "checkpoint"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Glm4ForTokenClassification"],
        "id2label": {str(index): f"L{index}" for index in range(4)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    tensors["score.weight"] = (torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    tensors["score.bias"] = torch.zeros(4).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("precision", "least"), [("fp32", 1.0), ("fp16", 0.995), ("int8", 0.98), ("int4", 0.92)])
def test_labels_agree_with_fp32(
    precision: str, least: float, tagger: Path, build_bundle: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/numerics.md has the shares of 2,803 tokens: 100%, 100%, 99.5% and 96.9%."""
    bundle = build_bundle(tagger, precision=precision, target="cpu")
    prompts = (tagger / "heldout.txt").read_text(encoding="utf-8").split("\n")[:40]
    given = [item for prompt in prompts if prompt.strip() for item in ("--prompt", prompt)]
    assert cli.main(["verify", str(bundle), "--checkpoint", str(tagger), "--json", *given]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] > 500 and report["top1"] >= least and report["failures"] == []


def test_verify_finds_another_head(
    tagger: Path,
    build_bundle: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = build_bundle(tagger, precision="fp32", target="cpu")
    assert cli.main(["verify", str(bundle), "--checkpoint", str(tagger)]) == 0
    assert capsys.readouterr().out.endswith("passed\n")
    logits = Encoder.logits
    monkeypatch.setattr(Encoder, "logits", lambda *args, **given: [rows + 1e-3 for rows in logits(*args, **given)])
    assert cli.main(["verify", str(bundle), "--checkpoint", str(tagger)]) == 1
    assert "FAILED: relative error" in capsys.readouterr().out
    assert cli.main(["verify", str(bundle), "--checkpoint", str(tagger), "--long"]) == 2
    assert "--long goes with bundles that generate text; leave it out" in capsys.readouterr().err
    assert cli.main(["verify", str(bundle), "--checkpoint", str(tagger), "--steps", "5"]) == 2
    assert "--steps goes with bundles that generate text; leave it out" in capsys.readouterr().err
    assert cli.main(["verify", str(bundle), "--checkpoint", str(tagger), "--prompt", ""]) == 2
    assert "the prompt '' is empty; at least one token is needed" in capsys.readouterr().err


def test_inspect_and_the_manifest(build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(random_encoder("sequence-classification", problem_type="multi_label_classification"), tmp_path)
    bundle = build_bundle(folder, precision="fp32", target="cpu")
    assert cli.main(["inspect", str(bundle)]) == 0
    told = "gives      3 labels of a text (LABEL_0, LABEL_1, LABEL_2, multi_label_classification); texts of up to 64"
    assert told in capsys.readouterr().out
    data = json.loads((bundle / MANIFEST).read_text())
    assert "cache" not in data and not (bundle / "genai_config.json").exists()
    assert data["encoder"] == {
        "labels": ["LABEL_0", "LABEL_1", "LABEL_2"],
        "max_seq_len": 64,
        "normalize": False,
        "pooling": None,
        "problem_type": "multi_label_classification",
    }
    assert data["tokens"] == {"bos": None, "eos": [], "pad": 0}
    with pytest.raises(UserError, match=r"manifest.json: a bundle for sequence-classification; open it with"):
        _ = read_manifest(bundle).cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, r"labels is \[\], expected at least one for sequence-classification"),
        ({"labels": ["a", "b", "a"]}, "labels has 'a' more than once, and scores go by label"),
        ({"labels": ["a", "b"]}, r"it gives 'logits' float32 \['batch', 3\]; for the manifest's sequence-.* of 2"),
        ({"max_seq_len": 65}, "it knows 64 positions, the manifest's encoder has 65"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is not one of single_label_classification"),
        ({"tokens": {"bos": None, "eos": [], "pad": 96}}, r"tokens: pad is 96, expected a token id in 0\.\.95; build"),
        ({"vocab_size": 97}, "it knows 96 tokens, the manifest's vocab_size is 97"),
        ({"task": "translation"}, "task 'translation' is not one of causal-lm, features, sequence-classification"),
    ],
)
def test_a_manifest_that_says_otherwise(
    change: dict[str, Any], message: str, classifier_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(classifier_bundle, tmp_path / "bundle"))
    data = json.loads((bundle / MANIFEST).read_text())
    for key, value in change.items():
        (data["encoder"] if key in data["encoder"] else data)[key] = value
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        load_encoder(bundle)


@pytest.fixture(scope="module")
def classifier_bundle(build_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(random_encoder("sequence-classification"), tmp_path_factory.mktemp("classifier"))
    return build_bundle(folder, precision="fp32", target="cpu")
