"""Bundles of quantized checkpoints: whose integers they hold, what they compute, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor
from transformers import Glm4ForCausalLM

from glm4export.build.build import build
from glm4export.build.options import BuildOptions
from glm4export.sources.checkpoint import CheckpointError, Location
from glm4export.sources.config_json import ConfigError
from glm4export.sources.lora import open_adapter
from glm4export.verification.verify import verify
from glm4export.weights.fp16 import BRANCH_SCALE
from glm4runtime import load
from glm4runtime.contract import UserError
from tests.conftest import Build
from tests.helpers import adapters, checkpoints, quantized
from tests.helpers.encoders import random_encoder
from tests.helpers.heldout import HELDOUT
from tests.helpers.logits import every_logit, exact_logits

WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 96, 20)]
GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
QKV = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
BY_ROWS = {"num_bits": 8, "strategy": "channel"}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """As many tokens as calibration needs at least, a byte each."""
    path = tmp_path / "text.txt"
    path.write_text(HELDOUT.read_text()[:400])
    return path


def initializers(bundle: Path, graph: str = "decode") -> dict[str, np.ndarray]:
    model = onnx.load(bundle / f"{graph}.onnx")
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def logits(model: Glm4ForCausalLM, *, halves: bool = False) -> np.ndarray:
    """transformers' logits; ``halves``: with head and embedding as float16 stores them."""
    with torch.no_grad():
        if halves:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                model.get_parameter(name).copy_(model.get_parameter(name).half().float())
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].numpy())


def test_a_classifiers_head_of_integers_is_refused(build_bundle: Build, tmp_path: Path) -> None:
    """Beside quantized weights; without a scale nothing tells what they mean."""

    def quantize(name: str, weight: Tensor) -> tuple[quantized.Parts, Tensor] | None:
        of = quantized.rounded(weight, 4, 32)
        return None if name == "score" else (quantized.gptq(of, v1=False), of.weight)

    said = {**quantized.GPTQ, "checkpoint_format": "gptq_v2"}
    folder = quantized.save(random_encoder("sequence-classification"), tmp_path, said, quantize)
    build_bundle(folder, precision="fp32", target="cpu")
    head = load_file(folder / "model.safetensors")["score.weight"]
    checkpoints.change(folder, score__weight=head.to(torch.int8))
    with pytest.raises(CheckpointError, match=r"mis-typed score\.weight: int8, expected float32 or float16"):
        build_bundle(folder, precision="fp32", target="cpu")


def test_a_quantized_head_that_features_leave_out_is_not_counted(
    build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantize(name: str, weight: Tensor) -> tuple[quantized.Parts, Tensor]:
        of = quantized.rounded(weight, 8 if name == "lm_head" else 4, 32)
        return quantized.gptq(of, v1=False), of.weight

    said = {**quantized.GPTQ, "checkpoint_format": "gptq_v2", "lm_head": True, "dynamic": {"lm_head": {"bits": 8}}}
    folder = quantized.save(checkpoints.random_model(), tmp_path, said, quantize)
    build_bundle(folder, precision="int4", target="cpu", task="features")
    told = capsys.readouterr().err
    assert "(12 x GPTQ int4 in groups of 32); 12 of 12 weights keep their own numbers" in told
    assert "lm_head.weight left out, since features needs no head" in told


def packed(values: Tensor) -> np.ndarray:
    """Two to a byte, the first in the low half; an odd last one alone."""
    even = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).numpy().astype(np.uint8)
    return np.asarray(even[:, 0::2] | even[:, 1::2] << 4)


@pytest.mark.parametrize(
    ("method", "group"), [("gptq", 32), ("gptq", 128), ("gptq_v2, asymmetric", 64), ("awq", 32), ("awq", 128)]
)
def test_a_bundle_holds_the_checkpoints_integers_to_the_bit(
    method: str, group: int, build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block size and zero points are the checkpoint's without a word from the user."""
    model, symmetric = checkpoints.random_model(**WIDE), method == "gptq"
    meant = {
        name: quantized.rounded(parameter.detach().clone(), 4, group, symmetric=symmetric)
        for name, parameter in model.named_parameters()
        if name in (DOWN, *QKV)
    }
    if method == "awq":
        folder = quantized.save_awq(model, tmp_path, group=group)
    else:
        folder = quantized.save_gptq(model, tmp_path, group=group, symmetric=symmetric, v1=symmetric)
    bundle = build_bundle(folder, precision="int4", target="cpu", head_bits=16)
    assert f"12 of 12 weights keep their own numbers, stored in blocks of {group}, " in capsys.readouterr().err
    stored = initializers(bundle)
    for name, parts in ((DOWN, [meant[DOWN]]), ("model.layers.0.self_attn.qkv_proj.weight", [meant[n] for n in QKV])):
        rows, columns = sum(len(part.q) for part in parts), parts[0].q.shape[1]
        data = np.concatenate([packed(part.q) for part in parts])
        np.testing.assert_array_equal(stored[f"{name}.data"], data.reshape(rows, columns // group, group // 2))
        scales = torch.cat([part.scales for part in parts])
        np.testing.assert_array_equal(stored[f"{name}.scales"].reshape(scales.shape), scales.numpy())
        if symmetric:
            assert f"{name}.zero_points" not in stored
        else:
            zeros = np.concatenate([packed(part.zeros) for part in parts])
            np.testing.assert_array_equal(stored[f"{name}.zero_points"].reshape(zeros.shape), zeros)
    assert np.abs(exact_logits(bundle, TOKENS) - logits(model, halves=True)).max() <= 1e-4


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_compressed_tensors_keep_their_integers(
    precision: str, build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four bits fit into eight: an int8 bundle of an int4 checkpoint loses nothing either."""
    pytest.importorskip("compressed_tensors")
    model = checkpoints.random_model(**WIDE)
    weights = {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}
    folder = quantized.save_compressed(model, tmp_path, weights)
    bundle = build_bundle(folder, precision=precision, target="cpu", head_bits=16)
    kind = "asymmetric" if precision == "int4" else "symmetric"
    told = (
        "(12 x compressed-tensors int4 in groups of 64); 12 of 12 weights keep their own numbers, stored in blocks of "
    )
    assert f"{told}64, {kind}\n" in capsys.readouterr().err
    assert np.abs(exact_logits(bundle, TOKENS) - logits(model, halves=True)).max() <= 1e-4


def test_a_quantized_head_keeps_its_integers_in_eight_bits(build_bundle: Build, tmp_path: Path) -> None:
    model = checkpoints.random_model(**WIDE)
    head = quantized.rounded(model.lm_head.weight.detach().clone(), 4, 64)
    folder = quantized.save_gptq(model, tmp_path, group=64, head=True)
    stored = initializers(build_bundle(folder, precision="int4", target="cpu"))
    np.testing.assert_array_equal(stored["lm_head.weight.data"].reshape(96, 128), head.q.numpy() - 8 + 128)
    np.testing.assert_array_equal(stored["lm_head.weight.scales"].reshape(96, 2), head.scales.numpy())


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fp32": ({}, {"precision": "fp32"}, "(12 x GPTQ int4 in groups of 32); weights are dequantized and stored in fp32"),
    "larger blocks": (
        {},
        {"precision": "int4", "block_size": 64},
        "12 are dequantized and quantized again, to int4, which loses more: --precision int8 or fp16 loses less",
    ),
    "fewer bits": ({"bits": 8}, {"precision": "int4"}, "12 are dequantized and quantized again, to int4"),
    "act-order": (
        {"shuffled": True},
        {"precision": "int8"},
        "12 are dequantized and quantized again, to int8; in 12 act-order leaves columns of a group apart, which no",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_stored_otherwise_is_told_and_close(
    name: str, build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, wanted, told = OTHERWISE[name]
    model = checkpoints.random_model(**WIDE)
    bundle = build_bundle(quantized.save_gptq(model, tmp_path, **options), target="cpu", **wanted)
    assert told in capsys.readouterr().err
    found = every_logit(bundle, [TOKENS])[0]
    limit = {"fp32": 2e-5, "int8": 0.5, "int4": 4.0}[wanted["precision"]]
    assert np.abs(found - logits(model)).max() <= limit


def test_small_blocks_share_a_groups_scale(build_bundle: Build, tmp_path: Path) -> None:
    model = checkpoints.random_model(**WIDE)
    folder = quantized.save_gptq(model, tmp_path, group=128, symmetric=False)
    options = {"precision": "int4", "block_size": 32, "symmetric": False, "head_bits": 16}
    bundle = build_bundle(folder, target="cpu", **options)
    assert np.abs(exact_logits(bundle, TOKENS) - logits(model, halves=True)).max() <= 1e-4


def test_tensorrt_takes_int8_rows(build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    model = checkpoints.random_model(**WIDE)
    scales = (model.get_parameter(DOWN).detach().abs().amax(1) / 127.5).bfloat16()
    folder = quantized.save_compressed(model, tmp_path / "int8", BY_ROWS, PER_TOKEN)
    stored = initializers(build_bundle(folder, precision="int8", target="tensorrt", max_seq_len=64), "step")
    assert "12 of 12 weights keep their own numbers, stored by rows" in capsys.readouterr().err
    meant = model.get_parameter(DOWN).detach()
    np.testing.assert_allclose(stored[f"{DOWN}.int8_scales"].astype(np.float32), scales.float().numpy(), rtol=1e-3)
    exact = (meant / scales.float()[:, None]).round().T.numpy()
    np.testing.assert_array_equal(stored[f"{DOWN}.int8"], exact)


def test_tensorrt_takes_symmetric_blocks(build_bundle: Build, tmp_path: Path) -> None:
    model = checkpoints.random_model(**WIDE)
    down, gate_up = (quantized.rounded(model.get_parameter(name).detach().clone(), 4, 64) for name in (DOWN, GATE_UP))
    folder = quantized.save_gptq(model, tmp_path / "int4", group=64)
    stored = initializers(build_bundle(folder, precision="int4", target="tensorrt", max_seq_len=64), "step")
    np.testing.assert_array_equal(stored[f"{DOWN}.int4"].astype(np.int8), (down.q - 8).T.numpy())
    np.testing.assert_array_equal(stored[f"{DOWN}.int4_scales"].reshape(-1, 128), down.scales.T.numpy())
    np.testing.assert_array_equal(stored[f"{GATE_UP}.int4"].astype(np.int8), (gate_up.q - 8).T.numpy())
    gate_up.scales[256:] *= BRANCH_SCALE  # of the up half, to keep fp16 finite
    np.testing.assert_array_equal(stored[f"{GATE_UP}.int4_scales"], gate_up.scales.T.numpy())


def test_fp8_weights_stay_what_they_are(build_bundle: Build, text: Path, tmp_path: Path) -> None:
    """One scale for a whole matrix stays one for every row, where rounding again would give each its own."""
    pytest.importorskip("compressed_tensors")
    model = checkpoints.random_model(**WIDE, vocab_size=256)
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    folder = quantized.save_compressed(model, tmp_path / "model", weights, weights)
    bundle = build_bundle(folder, precision="fp8", target="tensorrt", max_seq_len=64, calibrate=text)
    stored = initializers(bundle, "step")
    data, scales = stored[f"{DOWN}.fp8"].astype(np.float32), stored[f"{DOWN}.fp8_scales"].astype(np.float32)
    assert (scales == scales[0]).all()
    meant = model.get_parameter(DOWN).detach()
    np.testing.assert_array_equal(data.T, (meant / (meant.abs().max() / 448)).to(torch.float8_e4m3fn).float().numpy())


def test_prefill_in_int8_takes_int8_rows(build_bundle: Build, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = checkpoints.random_model(**WIDE)
    folder = quantized.save_compressed(model, tmp_path, BY_ROWS, PER_TOKEN)
    bundle = build_bundle(folder, precision="int8", target="cpu", prefill_precision="int8")
    stored = initializers(bundle, "prefill")
    found = stored[f"{DOWN}.int8"].T.astype(np.float32) * stored[f"{DOWN}.int8_scales"][:, None]
    np.testing.assert_allclose(found, model.get_parameter(DOWN).detach().numpy(), rtol=2e-7)


def test_calibration_is_for_the_cache_alone(build_bundle: Build, text: Path, tmp_path: Path) -> None:
    model = checkpoints.random_model(**WIDE, vocab_size=256)
    folder = quantized.save_gptq(model, tmp_path / "model")
    with pytest.raises(UserError, match=r"--calibrate does not go with .* \(gptq\): .* or add --kv-cache int8"):
        build_bundle(folder, precision="int4", target="cpu", calibrate=text)
    plain = initializers(build_bundle(folder, precision="int4", target="cpu"))
    with_cache = initializers(build_bundle(folder, precision="int4", target="cpu", kv_cache="int8", calibrate=text))
    for name in (DOWN, "model.layers.0.self_attn.qkv_proj.weight"):
        np.testing.assert_array_equal(plain[f"{name}.data"], with_cache[f"{name}.data"])


def test_verify_compares_with_the_dequantized_weights(build_bundle: Build, tmp_path: Path) -> None:
    folder = quantized.save_awq(checkpoints.random_model(**WIDE), tmp_path)
    bundle = build_bundle(folder, precision="fp32", target="cpu")
    report = verify(load(bundle), checkpoint=str(folder), steps=4)
    assert not report.failures and max(phase.max_abs for phase in report.phases) < 1e-4


def test_an_adapter_is_merged_into_the_dequantized_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No integers of the checkpoint's are handed over then, which know nothing of the adapter."""
    model = checkpoints.random_model()
    folder = quantized.save_gptq(model, tmp_path / "model")
    trained = adapters.train(model, tmp_path / "adapter", r=4, target_modules=["down_proj", "q_proj"])
    adapter, silent = open_adapter(str(trained)), {"stage": lambda name: nullcontext(), "bar": no_bar}
    options = BuildOptions(precision="fp32", target="cpu")
    build(Location(folder, {}), tmp_path / "out", options, adapters=[adapter], **silent)
    assert "quantized already; adapters are merged into its dequantized weights\n" in capsys.readouterr().err
    wanted = logits(adapters.merge(model, [(trained, 1.0)]))
    assert np.abs(every_logit(tmp_path / "out", [TOKENS])[0] - wanted).max() <= 2e-5


def no_bar(*size_and_name: object) -> nullcontext[Callable[[int], None]]:
    return nullcontext(lambda count: None)


def test_options_given_outright_are_kept() -> None:
    formats = BuildOptions("int4").formats
    assert formats is not None and (formats.block, formats.symmetric) == (128, True)


def test_a_refused_checkpoint_leaves_nothing(build_bundle: Build, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.random_model(), tmp_path / "model")
    quantized.say(tmp_path / "model", {"quant_method": "hqq"})
    with pytest.raises(ConfigError, match="quant_method='hqq'"):
        build_bundle(tmp_path / "model", precision="int4", target="cpu")
