"""int8 and int4 builds: the graphs they get, the numbers they give, and the bytes they were promised to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.build.options import BuildOptions
from glm4export.inspection.estimate import cache_bytes_per_token, parameters, weight_bytes
from glm4export.sources.config_json import read_config
from glm4export.verification.verify import kl_divergence, verify
from glm4export.weights.quantize import Scheme, quantize
from glm4runtime import Session, load
from glm4runtime.contract import UserError, read_manifest
from glm4runtime.text.tokenizer import Tokenizer
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.demo import DEMO, PROMPTS
from tests.helpers.dequantize import dequantize
from tests.helpers.logits import every_logit, exact_logits

LAYERS = 2


def dequantized(model: Glm4ForCausalLM, bits: int, head_bits: int, embedding_bits: int, block: int, symmetric: bool):
    """transformers' model with the weights that the kernels compute with."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            width = {"model.embed_tokens.weight": embedding_bits, "lm_head.weight": head_bits}.get(name, bits)
            if tensor.dim() < 2:
                continue
            if width == 16:
                tensor.copy_(tensor.half().float())
            else:
                scheme = Scheme(width, block, symmetric, torch.float16)
                tensor.copy_(dequantize(quantize(tensor, scheme), scheme))
    return model


FORMATS = {
    "int4": {"precision": "int4"},
    "int4, block 32": {"precision": "int4", "block_size": 32},
    "int4, asymmetric, everything": {"precision": "int4", "symmetric": False, "head_bits": 4, "embedding_bits": 4},
    "int4, wide head": {"precision": "int4", "head_bits": 16},
    "int8": {"precision": "int8"},
    "int8, asymmetric, everything": {"precision": "int8", "symmetric": False, "embedding_bits": 8},
}


@pytest.mark.parametrize("name", FORMATS)
def test_graphs_compute_with_the_quantized_weights(name: str, build_bundle: Build) -> None:
    options = BuildOptions(**FORMATS[name], target="cpu")
    geometry: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    bundle = build_bundle(checkpoints.random_model(**geometry), **FORMATS[name], target="cpu")
    formats = options.formats
    assert formats is not None
    model = dequantized(
        checkpoints.random_model(**geometry),
        formats.linear_bits,
        formats.head_bits,
        formats.embedding_bits,
        formats.block,
        formats.symmetric,
    )
    tokens = np.random.default_rng(0).integers(0, 96, 20).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(exact_logits(bundle, tokens) - wanted).max() <= 1e-4

    graph = onnx.load(bundle / "decode.onnx", load_external_data=False).graph
    found = [node.op_type for node in graph.node]
    head = 0 if formats.head_bits == 16 else 1
    assert found.count("MatMulNBits") == 4 * LAYERS + head
    assert found.count("MatMul") == 1 - head
    assert found.count("GatherBlockQuantized") == (formats.embedding_bits < 16)
    assert sum(len(node.input) == 6 for node in graph.node if node.op_type == "MatMulNBits") == LAYERS  # qkv's bias


@pytest.mark.parametrize("name", [*FORMATS, "fp32", "fp16"])
def test_estimate_is_what_a_build_takes(name: str, build_bundle: Build) -> None:
    choice = FORMATS.get(name) or {"precision": name}
    model = checkpoints.random_model(intermediate_size=160, attention_bias=False)
    bundle = build_bundle(model, **choice, target="cpu")
    config, options = read_config(bundle / "config.json"), BuildOptions(**choice, target="cpu")
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False).graph
    lengths = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "length"]
    assert weight_bytes(config, options) == sum(lengths)
    assert cache_bytes_per_token(config, options.cache_dtype) == read_manifest(bundle).cache.bytes_per_token
    assert parameters(config) == model.num_parameters()


@pytest.mark.parametrize(("precision", "right"), [("int8", 35), ("int4", 30)])
def test_embedded_model_keeps_its_answers(precision: str, right: int, quantized_demo: dict[str, Session]) -> None:
    session = quantized_demo[precision]
    answers = [session.chat(prompt["messages"], tools=prompt.get("tools")).read() for prompt in PROMPTS]
    assert sum(answer == prompt["answer"] for answer, prompt in zip(answers, PROMPTS, strict=True)) >= right
    report = verify(session, steps=16)
    assert not report.failures


@pytest.fixture(scope="module")
def quantized_demo(build_bundle: Build) -> dict[str, Session]:
    return {precision: load(build_bundle(None, precision=precision, target="cpu")) for precision in ("int8", "int4")}


def test_prefill_in_int8_leaves_decode_alone_and_beats_int4(build_bundle: Build) -> None:
    plain = build_bundle(None, precision="int4", target="cpu")
    mixed = build_bundle(None, precision="int4", target="cpu", prefill_precision="int8")
    nodes = {
        name: [node.op_type for node in onnx.load(mixed / f"{name}.onnx", load_external_data=False).graph.node]
        for name in ("prefill", "decode")
    }
    assert nodes["prefill"].count("MatMulIntegerToFloat") == nodes["prefill"].count("QuantizeLinear") == 4 * 4
    assert nodes["prefill"].count("MatMulNBits") == 1  # the head, decode's own
    assert nodes["decode"].count("MatMulNBits") == 4 * 4 + 1

    reports = {bundle: verify(load(bundle), steps=8) for bundle in (plain, mixed)}
    kl = {bundle: {phase.name: phase.mean_kl for phase in report.phases} for bundle, report in reports.items()}
    assert kl[mixed]["prefill"] < kl[plain]["prefill"] / 2
    assert kl[mixed]["continuation"] < kl[plain]["continuation"] / 2


def test_int8_rows_are_near_the_float_model_and_survive_a_row_of_zeros(build_bundle: Build) -> None:
    geometry: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "attention_bias": False}
    model = checkpoints.random_model(**geometry)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0  # its first norm gives zeros, so does the scale of the row
    bundle = build_bundle(model, precision="int8", target="cpu", head_bits=16, prefill_precision="int8")
    tokens = [7, *np.random.default_rng(0).integers(0, 96, 20).tolist()]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0, -1].numpy()
    found = load(bundle).runner.prefill(tokens)
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("choice", [{"precision": "fp16", "target": "cpu"}, {"precision": "int4", "target": "cuda"}])
def test_prefill_precision_needs_a_quantized_cpu_bundle(choice: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--prefill-precision int8 goes with --target cpu and --precision int8 or int4"):
        BuildOptions(**choice, prefill_precision="int8")


def test_calibrated_weights_are_closer_and_leave_nothing_behind(build_bundle: Build, tmp_path: Path) -> None:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    sample = tmp_path / "sample.txt"
    sample.write_text(text[8000:], encoding="utf-8")
    tokens = Tokenizer.from_file(DEMO / "tokenizer.json").encode(text[:8000])[:768]
    wanted = every_logit(build_bundle(None, precision="fp32", target="cpu"), [tokens])

    def distance(**options: Any) -> float:
        bundle = build_bundle(None, precision="int4", target="cpu", **options)
        names = {path.name for path in bundle.iterdir()}
        assert names == {*read_manifest(bundle).files, "manifest.json"}
        return float(kl_divergence(wanted, every_logit(bundle, [tokens])).mean())

    assert distance(block_size=32, calibrate=sample) < 0.9 * distance(block_size=32)


def test_calibration_needs_text_and_a_quantized_precision(build_bundle: Build, tmp_path: Path) -> None:
    message = "--calibrate goes with --precision fp8, int8 or int4, or with --kv-cache int8: fp16 with a float16 cache"
    with pytest.raises(UserError, match=message):
        BuildOptions("fp16", calibrate=tmp_path)
    with pytest.raises(UserError, match="cannot be read as text"):
        build_bundle(None, precision="int4", target="cpu", calibrate=tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("Call me Ishmael.")
    with pytest.raises(UserError, match=r"the calibration text has \d+ tokens; give at least 256"):
        build_bundle(None, precision="int4", target="cpu", calibrate=tmp_path / "short.txt")
