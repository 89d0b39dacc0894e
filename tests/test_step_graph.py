"""The step graph that TensorRT gets, run by ONNX Runtime on the CPU, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.checkpoint import locate
from glm4export.verify import PROMPTS, kl_divergence
from glm4runtime.contract import read_manifest
from glm4runtime.tokenizer import Tokenizer

from . import checkpoints
from .conftest import Build
from .test_parity import GEOMETRIES, TOLERANCE, reference

STEPS = 16
ATTENTION_GEOMETRIES = (
    "gqa", "mha", "mqa", "24 heads a kv head", "wide heads", "narrow heads", "no bias", "full rotary", "tied", "yarn",
)  # fmt: skip


class StepGraph:
    """A step graph over a cache that past and present share."""

    def __init__(self, bundle: Path, batch: int = 1) -> None:
        self.manifest = read_manifest(bundle)
        self.session = ort.InferenceSession(bundle / "step.onnx")
        spec = self.manifest.cache
        shape = (batch, spec.kv_heads, spec.max_seq_len, spec.head_dim)
        past = [name for value in self.session.get_inputs() if (name := value.name).startswith("past")]
        self.cache = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec.dtype)) for name in past}
        self.lengths = np.zeros(batch, np.int64)

    def run(self, ids: np.ndarray, new: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Append ids [batch, seq], of which ``new`` [batch] are real; logits of ``rows``, by default of all."""
        batch, seq = ids.shape
        positions = self.lengths[:, None] + np.arange(seq)
        slots = np.arange(self.manifest.cache.max_seq_len)
        feeds = {
            "input_ids": ids,
            "position_ids": positions,
            "write_indices": self.lengths,
            "attention_mask": slots <= positions[:, None, :, None],
            "logit_rows": np.broadcast_to(np.arange(seq), (batch, seq)) if rows is None else rows,
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.lengths = self.lengths + new
        logits: np.ndarray = binding.copy_outputs_to_cpu()[-1]
        return logits


def ones(count: int) -> np.ndarray:
    return np.array([count])


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
    return {
        precision: build_bundle(None, precision=precision, target="tensorrt", max_seq_len=256)
        for precision in ("fp32", "fp16")
    }


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


def test_fp16_is_as_close_as_fp16_gets(demo_steps: dict[str, Path], demo_reference: Glm4ForCausalLM) -> None:
    bundle = demo_steps["fp16"]
    ids = Tokenizer.from_file(bundle / "tokenizer.json").encode(PROMPTS[3])
    found = StepGraph(bundle).run(np.array([ids]), ones(len(ids)))[0]
    wanted = reference(demo_reference, ids)
    assert kl_divergence(wanted, found).mean() < 1e-5
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.98


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
