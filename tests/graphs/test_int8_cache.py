"""--kv-cache int8: the graphs compute what transformers' model computes over a cache rounded the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import DynamicCache, Glm4ForCausalLM

from glm4export import cli
from glm4export.build.options import BuildOptions
from glm4export.inspection.estimate import cache_bytes_per_token, weight_bytes
from glm4export.sources.config_json import read_config
from glm4export.verification.verify import agreement, table, thresholds_of, verify
from glm4runtime import Session, load
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.backends.prepare import prepare
from glm4runtime.contract import UserError, past_name, present_name, read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.demo import DEMO
from tests.helpers.greedy import genai_greedy, our_greedy
from tests.helpers.heldout import HELDOUT
from tests.helpers.parity import GEOMETRIES, TOLERANCE

LETTERS = "the quick brown fox jumps over the lazy dog; " * 40
STEPS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(LETTERS)
    return path


class RoundedCache(DynamicCache):
    """transformers' cache, but what is kept is a runner's own int8 rows. ``exact``: a run reads its own unrounded.

    ``apart`` collects how far those rows are, in steps, from what this model's keys and values round to.
    """

    def __init__(self, runner: OrtRunner, steps: dict[tuple[int, str], Tensor]) -> None:
        super().__init__()
        self.runner, self.steps, self.exact = runner, steps, True
        self.apart: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        first, count = self.get_seq_length(layer_idx), key_states.shape[2]
        fresh, kept = {"key": key_states, "value": value_states}, []
        for part, x in fresh.items():
            step = self.steps[layer_idx, part]
            rows = torch.tensor(self.runner._cache._buffers[layer_idx, part].array[:, :, first : first + count])
            self.apart.append((rows - (x / step).round().clamp(-128, 127)).abs())
            kept.append(rows * step)
        full = super().update(*kept, layer_idx, *args, **kwargs)
        if not self.exact:
            return full
        return tuple(torch.cat((past[:, :, :first], x), 2) for past, x in zip(full, fresh.values(), strict=True))


def steps_of(bundle: Path) -> dict[tuple[int, str], Tensor]:
    """The scales that a bundle's decode graph reads."""
    graph = onnx.load(bundle / "decode.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    return {
        (layer, part): torch.tensor(numpy_helper.to_array(stored[f"model.layers.{layer}.self_attn.{part}_scales"]))
        for layer in range(read_manifest(bundle).cache.layers)
        for part in ("key", "value")
    }


def run(model: Glm4ForCausalLM, cache: RoundedCache, tokens: list[int], *, exact: bool) -> np.ndarray:
    """Logits of every token, [len(tokens), vocab]."""
    cache.exact = exact
    with torch.no_grad():
        return model(torch.tensor([tokens]), past_key_values=cache).logits[0].numpy()


@pytest.mark.parametrize("name", ["gqa", "mha", "24 heads a kv head", "wide heads", "tied, no bias, full rotary, mqa"])
def test_is_transformers_over_a_rounded_cache(name: str, build_bundle: Build, text: Path, tmp_path: Path) -> None:
    model = checkpoints.random_model(seed=len(name), **GEOMETRIES[name])
    folder = checkpoints.save_with_tokenizer(model, tmp_path / "checkpoint")
    bundle = build_bundle(folder, precision="fp32", target="cpu", kv_cache="int8", calibrate=text)
    runner = load(bundle).runner
    cache = RoundedCache(runner, steps_of(bundle))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 17 + STEPS).tolist()
    found, wanted = [], []
    for start, stop in ((0, 12), (12, 17)):  # a prompt in two chunks
        found.append(runner.prefill(tokens[start:stop]).copy())
        wanted.append(run(model, cache, tokens[start:stop], exact=True)[-1])
    for token in tokens[17:-5]:
        found.append(runner.decode(token).copy())
        wanted.append(run(model, cache, [token], exact=False)[-1])
    found.extend(runner.verify(tokens[-5:]))  # several at once through the decode graph
    wanted.extend(run(model, cache, tokens[-5:], exact=False))
    assert np.abs(np.stack(found) - np.stack(wanted)).max() <= TOLERANCE
    apart = torch.cat([steps.flatten() for steps in cache.apart])
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3  # a tie may fall the other way


def test_ragged_batches_and_buffers_of_their_own(build_bundle: Build, text: Path, tmp_path: Path) -> None:
    """Right-padded prefill and decode of unequal rows give each row's own logits; past and present lie apart."""
    folder = checkpoints.save_with_tokenizer(checkpoints.random_model(), tmp_path / "checkpoint")
    bundle = build_bundle(folder, precision="fp32", target="cpu", kv_cache="int8", calibrate=text)
    spec, runner = read_manifest(bundle).cache, load(bundle).runner
    rows = [list(range(5, 14)), [40, 41], [70, 3, 9, 8, 7]]
    names = [(layer, part) for layer in range(spec.layers) for part in ("key", "value")]
    past = {past_name(*name): np.full((3, spec.kv_heads, 16, spec.head_dim), 99, np.int8) for name in names}

    def step(graph: str, ids: list[list[int]], lengths: list[int]) -> np.ndarray:
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        session = ort.InferenceSession(bundle / f"{graph}.onnx")
        outputs = ["logits", *(present_name(*name) for name in names)]
        last = {"logit_rows": np.array(lengths)[:, None] - 1} if graph == "prefill" else {}
        logits, *present = session.run(outputs, {"input_ids": np.array(ids), "attention_mask": mask, **last, **past})
        past.update({past_name(*name): value for name, value in zip(names, present, strict=True)})
        return np.asarray(logits[:, -1])

    lengths = [len(row) for row in rows]
    found = [step("prefill", [row + [0] * (9 - len(row)) for row in rows], lengths)]
    assert all((value[:, :, 9:] == 99).all() for value in past.values())
    found += [
        step("decode", [[11]] * 3, [n + 1 for n in lengths]),
        step("decode", [[12]] * 3, [n + 2 for n in lengths]),
    ]
    for index, row in enumerate(rows):
        runner.rewind()
        alone = [runner.prefill(row).copy(), runner.decode(11).copy(), runner.decode(12).copy()]
        for batch, single in zip(found, alone, strict=True):
            np.testing.assert_allclose(batch[index], single, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def demo(build_bundle: Build) -> dict[str, Path]:
    options = {"target": "cpu", "kv_cache": "int8", "calibrate": HELDOUT}
    return {precision: build_bundle(None, precision=precision, **options) for precision in ("fp32", "fp16", "int4")}


@pytest.mark.parametrize(
    ("precision", "mean_kl", "top1"), [("fp32", 3e-4, 0.98), ("fp16", 3e-4, 0.98), ("int4", 2e-2, 0.9)]
)
def test_embedded_model_stays_near_fp32(precision: str, mean_kl: float, top1: float, demo: dict[str, Path]) -> None:
    report = verify(load(demo[precision]), steps=16)
    assert not report.failures, table(report)
    assert all(phase.mean_kl <= mean_kl for phase in report.phases), table(report)
    assert agreement(report.phases)[1] >= top1, table(report)
    prefill, decode, *_ = report.phases
    if precision == "fp32":
        assert prefill.max_abs <= 1e-4 < decode.mean_kl * 1e3  # prefill reads its own keys unrounded; decode doesn't


def test_prefill_holds_one_layers_float_copy_at_a_time(demo: dict[str, Path], tmp_path: Path) -> None:
    """By the order in which ONNX Runtime runs the nodes: a layer's past is read after the layer before has stored."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(demo["fp32"] / "prefill.onnx", options)
    spec = read_manifest(demo["fp32"]).cache
    names = [(layer, part) for layer in range(spec.layers) for part in ("key", "value")]
    feed: dict[str, np.ndarray] = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 9), np.int64)}
    shape = (1, spec.kv_heads, 16, spec.head_dim)
    feed["logit_rows"] = np.array([[2]])
    session.run(None, {**feed, **{past_name(*name): np.ones(shape, np.int8) for name in names}})
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    order = [event["name"].removesuffix("_kernel_time") for event in sorted(nodes, key=lambda event: event["ts"])]
    at = {name: index for index, name in enumerate(order)}
    for layer in range(spec.layers - 1):
        here, following = (f"model.layers.{index}.self_attn" for index in (layer, layer + 1))
        for part in ("key", "value"):
            assert at[f"{here}/{part}_cache/Past"] < at[f"{here}/{part}_cache/TensorScatter"]
            assert at[f"{here}/{part}_cache/TensorScatter"] < at[f"{following}/{part}_cache/Past"]


def test_manifest_inspect_and_estimate_tell_of_it(
    demo: dict[str, Path], demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, small = (read_manifest(bundles["fp32"]) for bundles in (demo_bundles, demo))
    assert (small.cache.dtype, 4 * small.cache.bytes_per_token) == ("int8", plain.cache.bytes_per_token)
    boundary = {spec.dtype for spec in small.graphs["decode"].inputs if spec.name.startswith("past")}
    assert boundary == {"int8"}
    assert cli.main(["inspect", str(demo["fp32"])]) == 0
    assert f"int8, {small.cache.bytes_per_token / 1000:.1f} KB a token" in capsys.readouterr().out

    config = read_config(demo["fp32"] / "config.json")
    options = BuildOptions("fp32", "cpu", kv_cache="int8", calibrate=HELDOUT)
    graph = onnx.load(demo["fp32"] / "decode.onnx", load_external_data=False).graph
    lengths = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "length"]
    assert weight_bytes(config, options) == sum(lengths)
    assert cache_bytes_per_token(config, options.cache_dtype) == small.cache.bytes_per_token

    assert cli.main(["inspect", str(DEMO), "--target", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["precisions"]["fp32"]
    assert facts["int8_cache"]["cache_bytes_per_token"] == small.cache.bytes_per_token
    assert 4 * facts["int8_cache"]["cache_bytes_at_full_length"] == facts["cache_bytes_at_full_length"]
    assert cli.main(["inspect", str(DEMO), "--target", "tensorrt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precisions"]["fp32"]["int8_cache"] is None


def test_thresholds_are_the_wider_of_precision_and_cache(demo: dict[str, Path], demo_bundles: dict[str, Path]) -> None:
    limits = {name: thresholds_of(read_manifest(bundle)) for name, bundle in demo.items()}
    assert (limits["fp32"].mean_kl, limits["fp32"].top1) == (1e-2, 0.96)
    assert (limits["int4"].mean_kl, limits["int4"].top1) == (2e-1, 0.80)
    assert thresholds_of(read_manifest(demo_bundles["fp32"])).mean_kl == 1e-6


def test_onnxruntime_genai_runs_the_decode_graph(demo: dict[str, Path]) -> None:
    session = load(demo["fp32"])
    prompt = session.tokenizer.encode("[gMASK]<sop><|user|>\nWhat is the capital of France?<|assistant|>\n")
    assert genai_greedy(demo["fp32"], prompt, 40) == our_greedy(session, prompt, 40)


def test_prepared_bundles_give_the_same(demo: dict[str, Path]) -> None:
    def logits() -> list[np.ndarray]:
        runner = load(demo["int4"], threads=1).runner
        return [runner.prefill(range(5, 25)).copy(), runner.prefill([7, 8]).copy(), runner.decode(9).copy()]

    plain = logits()
    prepare(demo["int4"], read_manifest(demo["int4"]))
    assert all(np.array_equal(a, b) for a, b in zip(plain, logits(), strict=True))


def test_cuda_graphs_read_int8_in_the_kernel(build_bundle: Build, demo_sessions: dict[str, Session]) -> None:
    """Never run on a GPU; the same graphs on the CPU."""
    bundle = build_bundle(None, precision="fp16", target="cuda", kv_cache="int8", calibrate=HELDOUT)
    for name in ("prefill", "decode"):
        nodes = onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph.node
        attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
        assert all(len(node.input) == 14 for node in attention) and len(attention) == 4
        values = {a.name: onnx.helper.get_attribute_value(a) for a in attention[0].attribute}
        assert (values["k_quant_type"], values["v_quant_type"], values["kv_cache_bit_width"]) == (
            b"PER_CHANNEL",
            b"PER_CHANNEL",
            8,
        )
    ours, wide = load(bundle, provider="cpu").runner, demo_sessions["fp16"].runner
    wide.rewind()
    tokens = list(range(5, 25))
    assert np.abs(ours.prefill(tokens) - wide.prefill(tokens)).max() < 0.2
    assert ours.decode(7).argmax() == wide.decode(7).argmax()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32", "kv_cache": "int8"}, r"--kv-cache int8 needs --calibrate FILE: a text like"),
        (
            {"precision": "int4", "kv_cache": "fp16", "calibrate": HELDOUT},
            r"--kv-cache fp16 does not go with --precision int4 on --target cpu: attention computes in float32 there",
        ),
        ({"precision": "fp16", "kv_cache": "fp32"}, r"attention computes in float16 there.*leave --kv-cache out"),
        ({"precision": "bf16", "target": "cuda", "kv_cache": "fp16"}, r"attention computes in bfloat16 there"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**options)


def test_the_default_may_be_named(build_bundle: Build) -> None:
    assert BuildOptions("fp32", kv_cache="fp32").cache_dtype == BuildOptions("int4").cache_dtype == "float32"
    assert BuildOptions("fp16", kv_cache="fp16").cache_dtype == "float16"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["build", "-o", str(tmp_path / "out"), "--precision", "fp32", "--target", "cpu", "--kv-cache", "int8"]
    assert cli.main(build) == 2
    assert "--kv-cache int8 needs --calibrate FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*build, "--calibrate", str(HELDOUT)]) == 0
    assert "fp32 with an int8 cache for cpu" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "out"), "--steps", "4"]) == 0
    assert (
        cli.main(["bench", str(tmp_path / "out"), "--prefill", "8", "--decode-context", "8", "--steps", "2", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["workload"]["cache_bytes_per_token"] == 2 * 4 * 2 * 64
