"""The step graph that TensorRT gets, run by ONNX Runtime on the CPU, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.build.options import BuildOptions
from glm4export.calibration.calibrate import token_sequences
from glm4export.calibration.observe import observe
from glm4export.inspection.estimate import weight_bytes
from glm4export.sources.checkpoint import Checkpoint, locate
from glm4export.sources.config_json import read_config
from glm4export.verification.phases import PROMPTS
from glm4export.verification.verify import kl_divergence
from glm4export.weights.quantize import Scheme, quantize
from glm4runtime.contract import UserError, read_manifest
from glm4runtime.text.tokenizer import Tokenizer
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.dequantize import dequantize
from tests.helpers.parity import GEOMETRIES, TOLERANCE, reference
from tests.helpers.step_graph import StepGraph, ones

STEPS = 16
ATTENTION_GEOMETRIES = (
    "gqa", "mha", "mqa", "24 heads a kv head", "wide heads", "narrow heads", "no bias", "full rotary", "tied", "yarn",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo_reference() -> Glm4ForCausalLM:
    return Glm4ForCausalLM.from_pretrained(locate(None).folder, dtype=torch.float32).eval()


def check_parity(bundle: Path, model: Glm4ForCausalLM, prompt: list[int]) -> None:
    """Prefill for one row's logits, greedy decode, then the prompt again in chunks."""
    graph, tokens = StepGraph(bundle), list(prompt)
    ids = np.array([prompt])
    found = [graph.run(ids, ones(len(prompt)), np.array([[len(prompt) - 1]]))[0, 0]]
    for _ in range(STEPS):
        tokens.append(int(found[-1].argmax()))
        found.append(graph.run(np.array([tokens[-1:]]), ones(1))[0, 0])
    wanted = reference(model, tokens)
    assert np.abs(np.stack(found) - wanted[len(prompt) - 1 :]).max() <= TOLERANCE

    graph = StepGraph(bundle)
    chunks = [
        graph.run(ids[:, start : start + 5], ones(len(ids[0, start : start + 5])))[0] for start in range(0, ids.size, 5)
    ]
    assert np.abs(np.concatenate(chunks) - wanted[: len(prompt)]).max() <= TOLERANCE


@pytest.mark.parametrize("name", ATTENTION_GEOMETRIES)
def test_random_geometries(name: str, build_bundle: Build) -> None:
    model = checkpoints.random_model(seed=len(name), **GEOMETRIES[name])
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 17).tolist()
    check_parity(build_bundle(model, precision="fp32", target="tensorrt"), model, prompt)


@pytest.fixture(scope="module")
def demo_steps(build_bundle: Build) -> dict[str, Path]:
    """The embedded model for TensorRT."""
    text = locate(None).folder / "heldout.txt"
    options: dict[str, Any] = {"target": "tensorrt", "max_seq_len": 256}
    bundles = {name: build_bundle(None, precision=name, **options) for name in ("fp32", "fp16", "int8", "int4")}
    return {**bundles, "fp8": build_bundle(None, precision="fp8", calibrate=text, **options)}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embedded_model(prompt: str, demo_steps: dict[str, Path], demo_reference: Glm4ForCausalLM) -> None:
    bundle = demo_steps["fp32"]
    check_parity(bundle, demo_reference, Tokenizer.from_file(bundle / "tokenizer.json").encode(prompt))


def test_three_sequences_of_unequal_lengths(build_bundle: Build) -> None:
    """Right-padded prefill, decode of all rows at once, and drafts verified for all of them."""
    model = checkpoints.random_model()
    graph = StepGraph(build_bundle(model, precision="fp32", target="tensorrt"), batch=3)
    texts = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((3, 5), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    logits = graph.run(ids, lengths, lengths[:, None] - 1)
    assert logits.shape == (3, 1, 96)
    for run in ([[31], [32], [33]], [[41, 42], [43, 44], [45, 46]]):
        for row, text in enumerate(texts):
            assert np.abs(logits[row, -1] - reference(model, text)[-1]).max() <= TOLERANCE
            text.extend(run[row])
        logits = graph.run(np.array(run), np.full(3, len(run[0])))
    for row, text in enumerate(texts):
        assert np.abs(logits[row] - reference(model, text)[-2:]).max() <= TOLERANCE


@pytest.mark.parametrize(("precision", "mean_kl"), [("fp16", 1e-5), ("int8", 2e-3), ("int4", 3e-2), ("fp8", 3e-2)])
def test_lower_precisions_stay_close(
    precision: str, mean_kl: float, demo_steps: dict[str, Path], demo_reference: Glm4ForCausalLM
) -> None:
    bundle = demo_steps[precision]
    tokenizer, found, wanted = Tokenizer.from_file(bundle / "tokenizer.json"), [], []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        found.append(StepGraph(bundle).run(np.array([ids]), ones(len(ids)))[0])
        wanted.append(reference(demo_reference, ids))
    divergence = kl_divergence(np.concatenate(wanted), np.concatenate(found)).mean()
    assert divergence < mean_kl


def test_estimate_is_what_a_build_takes(demo_steps: dict[str, Path]) -> None:
    for precision, bundle in demo_steps.items():
        options = BuildOptions(precision, "tensorrt", 256, calibrate=Path() if precision == "fp8" else None)
        graph = onnx.load(bundle / "step.onnx", load_external_data=False).graph
        lengths = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "length"]
        assert weight_bytes(read_config(bundle / "config.json"), options) == sum(lengths), precision


@pytest.mark.parametrize("head_bits", [4, 8, 16])
def test_quantized_weights_are_those_of_the_quantizer(head_bits: int, build_bundle: Build) -> None:
    """Stored bytes as ONNX reads them, in the layout of MatMul: int4 in blocks, int8 by output channel."""
    model = checkpoints.random_model(vocab_size=98, hidden_size=64, intermediate_size=96)
    bundle = build_bundle(model, precision="int4", target="tensorrt", head_bits=head_bits, block_size=64)
    graph = onnx.load(bundle / "step.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    scheme = Scheme(4, 32, scale_dtype=torch.float16, positive=True)  # 96 inputs: blocks of 64 don't fit
    wanted = dequantize(quantize(down, scheme), scheme)
    integers, scales = (stored[f"model.layers.1.mlp.down_proj.weight.int4{part}"] for part in ("", "_scales"))
    assert integers.shape == (96, 64) and scales.shape == (3, 64) and (scales > 0).all()
    found = integers.astype(np.float32) * scales.astype(np.float32).repeat(32, 0)
    assert np.array_equal(found, wanted.numpy().T)
    head = model.lm_head.weight.detach().numpy()
    if head_bits == 16:
        assert np.array_equal(stored["lm_head.weight"], head.astype(np.float16).T)
    else:
        integers, scales = (stored[f"lm_head.weight.int{head_bits}{part}"] for part in ("", "_scales"))
        assert integers.shape == (64, 98) and scales.shape == {4: (1, 98), 8: (98,)}[head_bits]
        error = np.abs(integers.astype(np.float32) * scales.astype(np.float32) - head.T)
        assert (error <= 0.51 * scales.astype(np.float32) + 1e-7).mean() > 0.97  # a few largest weights are clipped
    assert {node.op_type for node in graph.node if "Dequantize" in node.op_type} == {"DequantizeLinear"}


def test_fp8_scales_are_what_the_text_reached(demo_steps: dict[str, Path]) -> None:
    """down_proj's input is 2^-7 of the checkpoint's, since fp16 holds it scaled; weights reach 448 in every channel."""
    folder = locate(None).folder
    checkpoint, text = Checkpoint.open(folder), (folder / "heldout.txt").read_text(encoding="utf-8")
    reached = observe(read_config(folder / "config.json"), checkpoint, token_sequences(text, folder)).inputs
    graph = onnx.load(demo_steps["fp8"] / "step.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    scales = {name: float(onnx.numpy_helper.to_array(stored[name])) for name in stored if name.endswith("input_scale")}
    assert len(scales) == 4 * 4
    for name, linear, factor in (
        ("model.layers.2.self_attn.qkv_proj", "model.layers.2.self_attn.k_proj.weight", 1.0),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.weight", 2.0**-7),
    ):
        assert scales[f"{name}.input_scale"] == pytest.approx(reached[linear] * factor / 448, rel=1e-2)
    weight = onnx.numpy_helper.to_array(stored["model.layers.0.mlp.down_proj.weight.fp8"]).astype(np.float32)
    assert stored["model.layers.0.mlp.down_proj.weight.fp8"].data_type == onnx.TensorProto.FLOAT8E4M3FN
    assert np.abs(weight).max(0) == pytest.approx(448.0)
    assert [node.op_type for node in graph.node].count("QuantizeLinear") == 4 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetric": False}, "--asymmetric does not go with --target tensorrt"),
        ({"embedding_bits": 8}, "--embedding-bits 8 does not go with --target tensorrt"),
        ({"precision": "int8", "calibrate": Path("x")}, "--calibrate does not go with --precision int8"),
        ({"prefill_precision": "int8"}, "--prefill-precision int8 goes with --target cpu"),
        ({"precision": "fp8"}, "--precision fp8 needs --calibrate FILE"),
        ({"precision": "fp8", "target": "cuda"}, "--precision fp8 does not run on --target cuda"),
    ],
)  # fmt: skip
def test_what_tensorrt_does_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**{"precision": "int4", "target": "tensorrt", **options})


def test_only_standard_operators_and_the_names_of_the_contract(demo_steps: dict[str, Path]) -> None:
    for bundle in demo_steps.values():
        model = onnx.load(bundle / "step.onnx", load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
        assert {node.domain for node in model.graph.node} == {""}
        counted = [node.op_type for node in model.graph.node]
        assert [counted.count(name) for name in ("Attention", "RotaryEmbedding", "TensorScatter")] == [4, 8, 8]
        assert counted.count("RMSNormalization") == 4 * 4 + 1
        graph = read_manifest(bundle).graphs["step"]
        assert [spec.name for spec in graph.inputs[:6]] == [
            "input_ids", "position_ids", "write_indices", "attention_mask", "logit_rows", "past_key_values.0.key",
        ]  # fmt: skip
        assert graph.inputs[3].dims == ("batch", 1, "seq", 256)
        assert graph.inputs[5].dims == ("batch", 2, 256, 64)
        assert graph.output("logits").dims == ("batch", "rows", 2048)
        assert not (bundle / "genai_config.json").exists()
