"""`verify` finds what is wrong with a bundle, and its reference is transformers' model."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from glm4export.calibration import streamed
from glm4export.calibration.streamed import Text, reference_logits
from glm4export.sources.checkpoint import Checkpoint
from glm4export.sources.config_json import read_config
from glm4export.verification.phases import PHASES
from glm4export.verification.verify import (
    THRESHOLDS,
    Parting,
    Phase,
    Report,
    Thresholds,
    _failures,
    kl_divergence,
    table,
    verify,
)
from glm4graphs.rope import rotary_tables
from glm4runtime import Session, UserError, load
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.demo import DEMO
from tests.helpers.parity import GEOMETRIES


@pytest.mark.parametrize("tied", [False, True])
def test_layer_by_layer_reference_is_transformers_model(tied: bool, tmp_path: Path) -> None:
    model = checkpoints.random_model(tie_word_embeddings=tied)
    folder = checkpoints.save(model, tmp_path)
    texts = [Text([5, 6, 7, 8], first=0), Text([9, 10, 11, 12, 13, 14], first=4)]
    found = reference_logits(read_config(folder / "config.json"), Checkpoint.open(folder), texts)
    assert [rows.shape for rows in found] == [(4, 96), (2, 96)]
    for text, rows in zip(texts, found, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([text.tokens])).logits[0, text.first :].numpy()
        assert np.abs(rows - wanted).max() <= 2e-5


@pytest.mark.parametrize("name", ["gqa", "24 heads a kv head", "one layer", "yarn"])
def test_reference_of_a_long_text_computes_some_rows_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_MASK_ELEMENTS", 60 * 7)
    monkeypatch.setattr(streamed, "_MLP_ROWS", 13)
    model = checkpoints.random_model(**GEOMETRIES[name])
    folder = checkpoints.save(model, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, 60).tolist()
    (rows,) = reference_logits(read_config(folder / "config.json"), Checkpoint.open(folder), [Text(tokens, first=0)])
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(rows - wanted).max() <= 2e-5


def test_embedded_bundles_pass(demo_sessions: dict[str, Session]) -> None:
    for precision, session in demo_sessions.items():
        report = verify(session, steps=8, long=True)
        assert not report.failures, table(report)
        assert [phase.name for phase in report.phases] == [*PHASES]
        assert [phase.positions for phase in report.phases] == [6, 48, 6, 54, 9 + 16, 9 + 16]
        assert report.left_out == () and report.cache_clipped is None
        assert session.runner.prefill_chunk == 512
        assert report.precision == precision
        assert all(parting.parts_at is None for parting in report.greedy) or precision != "fp32"
    partings = (Parting("Hello", 32, None), Parting("Goodbye", 32, 7), Parting("Why", 32, 0))
    told = table(dataclasses.replace(report, greedy=partings))
    assert "\n'Hello': all 32 greedy tokens equal\n'Goodbye': the first 7 of 32 greedy tokens equal\n" in told
    assert "\n'Why': not even the first of 32 greedy tokens equal\n" in told


def test_a_wrong_weight_is_found(build_bundle: Build, tmp_path: Path) -> None:
    """The bundle of one model against the checkpoint of another of the same shape."""
    bundle = build_bundle(checkpoints.random_model(seed=1), precision="fp32", target="cpu")
    other = checkpoints.random_model(seed=1)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.bias[3] += 0.5
    report = verify(load(bundle), checkpoint=str(checkpoints.save(other, tmp_path)))
    assert any("mean KL" in failure for failure in report.failures)
    assert "FAILED: decode: mean KL" in table(report)


def phases_that_fail(report: Report) -> set[str]:
    return {failure.split(":")[0] for failure in report.failures if not failure.startswith("top-1 agreement")}


def stored(bundle: Path, name: str) -> np.ndarray:
    """A tensor of a bundle's weights.bin, which writing to it changes."""
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False).graph
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(bundle / "weights.bin", dtype, "r+", offset, tuple(tensor.dims))


@pytest.mark.parametrize(("precision", "shift"), [("fp32", 1), ("fp16", 1), ("int4", 512)])
def test_wrong_rotary_rows_are_found_at_the_end_of_the_cache(
    precision: str, shift: int, build_bundle: Build, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(build_bundle(None, precision=precision, target="cpu"), tmp_path / "bundle"))
    for table_ in ("cos", "sin"):
        rows = stored(bundle, f"model.rotary_{table_}")
        rows[1792:] = rows[1792 - shift : -shift].copy()
    assert not verify(load(bundle), steps=8).failures
    assert phases_that_fail(verify(load(bundle), steps=8, long=True)) == {"long"}


def test_yarn_left_out_of_the_far_rows_is_found(build_bundle: Build, tmp_path: Path) -> None:
    """Rows past the model's original positions as they would be without YaRN."""
    model = checkpoints.random_model(**GEOMETRIES["yarn"])
    folder = checkpoints.save_with_tokenizer(model, tmp_path / "checkpoint")
    bundle, config = build_bundle(folder, precision="fp32", target="cpu"), read_config(folder / "config.json")
    arguments: dict[str, Any] = {"checkpoint": str(folder), "prompts": ["a fox"], "steps": 4, "long": True}
    assert not verify(load(bundle, prefill_chunk=12), **arguments).failures
    plain = dataclasses.replace(config, rope=dataclasses.replace(config.rope, scaling=None))
    for name, values in zip(("cos", "sin"), rotary_tables(plain, 64), strict=True):
        rows = stored(bundle, f"model.rotary_{name}")
        rows[48:, : values.shape[1]] = values.numpy()[48:]
    assert phases_that_fail(verify(load(bundle, prefill_chunk=12), **arguments)) == {"long"}


@pytest.mark.parametrize("fault", ["a row too early", "a row too late", "a token twice"])
def test_a_wrong_chunk_border_is_found(
    fault: str, demo_sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a second border, where no short prompt in two runs gets."""
    runner = demo_sessions["fp32"].runner
    right = runner._run_prompt

    def wrong(ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        if start != 128:
            return right(ids, start, padding)
        if fault == "a token twice":
            return right(np.concatenate((runner.sequence.tokens[-1:], ids[:-1])), start, padding)
        return right(ids, start + (1 if fault == "a row too late" else -1), padding)

    monkeypatch.setattr(runner, "_run_prompt", wrong)
    assert phases_that_fail(verify(demo_sessions["fp32"])) == {"chunks"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_a_clipped_int8_cache_is_found(precision: str, build_bundle: Build, tmp_path: Path) -> None:
    """By chats and longer texts: short prompts hardly see it. Int4 weights lose as much; there the cache tells."""
    options = {"kv_cache": "int8", "calibrate": DEMO / "heldout.txt"}
    right = build_bundle(None, precision=precision, target="cpu", **options)
    report = verify(load(right))
    assert not report.failures and report.cache_clipped is not None and report.cache_clipped < 1e-3, table(report)
    bundle = Path(shutil.copytree(right, tmp_path / "bundle"))
    for layer in range(4):
        for part in ("key", "value"):
            steps = stored(bundle, f"model.layers.{layer}.self_attn.{part}_scales")
            steps *= 0.5
    report = verify(load(bundle))
    assert report.cache_clipped is not None and report.cache_clipped > 0.01
    assert any(failure.startswith("int8 cache: ") and "ends of its range" in failure for failure in report.failures)
    if precision != "int4":
        kl = {failure.split(":")[0] for failure in report.failures if "mean KL" in failure}
        assert {"chat", "chunks"} <= kl and not kl & {"prefill", "continuation"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # ONNX Runtime has no bf16 on CPUs
def test_step_graphs_pass_in_both_cache_dtypes(precision: str, tensorrt_bundles: Callable[[str], Path]) -> None:
    session = load(tensorrt_bundles(precision), provider="cpu", max_seq_len=60)
    report = verify(session, steps=4, long=True)
    assert not report.failures, table(report)
    assert report.cache_dtype == {"fp32": "float32", "fp16": "float16"}[precision]
    assert [phase.name for phase in report.phases] == [*PHASES]


def test_what_was_not_seen_is_said(build_bundle: Build, tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.random_model(), tmp_path)
    bundle = build_bundle(folder, precision="fp32", target="cpu")
    report = verify(load(bundle, max_seq_len=4), checkpoint=str(folder), steps=1)
    assert report.left_out == (
        "chat: the bundle has no tokenizer that knows the prompts",
        "chunks: a cache of 4 tokens is too short for two borders",
        "long: the last rows of the cache are compared with --long",
    )
    assert "\nleft out: chat: the bundle has no tokenizer" in table(report)
    report = verify(load(bundle, max_seq_len=5), checkpoint=str(folder), steps=1, long=True)
    assert [phase.name for phase in report.phases] == ["prefill", "decode", "continuation", "chunks", "long"]
    assert report.left_out == ("chat: the bundle has no tokenizer that knows the prompts",)
    assert not report.failures


def test_a_template_that_fails_is_told(demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(demo_bundles["fp32"], tmp_path / "bundle"))
    template = "{{ raise_exception('no users here') }}"
    (bundle / "chat_template.jinja").write_text(template.ljust((bundle / "chat_template.jinja").stat().st_size))
    report = verify(load(bundle), prompts=["One"], steps=1)
    assert re.match(r"chat: .*no users here", report.left_out[0])


def test_top1_is_over_all_phases() -> None:
    def phase(name: str, positions: int, equal: int) -> Phase:
        return Phase(name, positions, max_abs=0.1, mean_abs=0.1, mean_kl=1e-4, top1=equal / positions)

    few, many = phase("chunks", 9, 8), phase("decode", 192, 190)
    assert _failures((few, many), None, THRESHOLDS["fp16"]) == ()
    found = _failures((few, phase("decode", 192, 188)), None, THRESHOLDS["fp16"])
    assert found == ("top-1 agreement 97.51% over 201 positions is below 98.0%",)


def test_thresholds_are_the_callers(demo_sessions: dict[str, Session]) -> None:
    report = verify(demo_sessions["fp16"], steps=2, prompts=["One"], thresholds=Thresholds(mean_kl=0.0, top1=0.0))
    assert [failure.split(":")[0] for failure in report.failures] == [*PHASES[:-1]]


def test_needs_the_checkpoint_that_the_bundle_was_built_from(build_bundle: Build, tmp_path: Path) -> None:
    session = load(build_bundle(checkpoints.random_model(), precision="fp32", target="cpu"))
    with pytest.raises(UserError, match="built from a local folder; name it with --checkpoint"):
        verify(session)
    other = checkpoints.save(checkpoints.random_model(num_hidden_layers=1), tmp_path)
    with pytest.raises(UserError, match="not the checkpoint that this bundle was built from"):
        verify(session, checkpoint=str(other))


def test_kl_divergence_is_torchs() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 33)) * 4
    log_p, log_q = (torch.tensor(logits).log_softmax(-1) for logits in (p, q))
    wanted = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl_divergence(p, q), wanted.numpy(), rtol=1e-12)
