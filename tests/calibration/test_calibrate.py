"""Calibrated quantization: less error where it counts, streamed, and in the layout that plain quantization has."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm4export.calibration import gptq, observe
from glm4export.calibration.calibrate import Calibration, calibrate, token_sequences
from glm4export.calibration.gptq import _cut, compensate, compensations
from glm4export.calibration.streamed import Text, reference_logits
from glm4export.sources.checkpoint import Checkpoint, locate
from glm4export.sources.config_json import read_config
from glm4export.verification.verify import kl_divergence
from glm4export.weights.quantize import Scheme, quantize
from glm4graphs.config import Glm4Config
from glm4runtime.contract import UserError
from tests.helpers import checkpoints
from tests.helpers.dequantize import dequantize

SCHEMES = [Scheme(4, 32), Scheme(4, 64, symmetric=False), Scheme(8, 16)]


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions explain most, as real activations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator)
    return torch.randn(tokens, columns // 4, generator=generator) @ mix + torch.randn(
        tokens, columns, generator=generator
    )


def output_error(weight: Tensor, found: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - found).T).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compensation_lowers_the_output_error(scheme: Scheme) -> None:
    weight, inputs = correlated(48, 192, seed=1), correlated(512, 192)
    plain = dequantize(quantize(weight, scheme), scheme)
    found = dequantize(compensate(weight, scheme, compensations(inputs, scheme.block)), scheme)
    unseen = correlated(512, 192, seed=0)[256:]
    assert output_error(weight, found, inputs) < 0.6 * output_error(weight, plain, inputs)
    assert output_error(weight, found, unseen) < 0.6 * output_error(weight, plain, unseen)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_uncorrelated_inputs_leave_nothing_to_compensate(scheme: Scheme) -> None:
    """H is then diagonal, and GPTQ is rounding."""
    weight = correlated(10, 128, seed=1)
    found = compensate(weight, scheme, compensations(torch.eye(128), scheme.block))
    plain = quantize(weight, scheme)
    assert (found.data != plain.data).float().mean() < 0.01  # but for weights half-way between levels
    torch.testing.assert_close(found.scales, plain.scales, rtol=1e-2, atol=0)
    assert (found.zero_points is None) == scheme.symmetric
    if found.zero_points is not None and plain.zero_points is not None:
        assert torch.equal(found.zero_points, plain.zero_points)


def test_factor_is_the_inverse_hessians() -> None:
    inputs = correlated(300, 96)
    for part in compensations(inputs, 16, max_group=40, damping=0.01):
        x = inputs[:, part.start : part.start + len(part.upper)]
        hessian = x.T @ x
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        assert torch.equal(part.upper, part.upper.triu())
        torch.testing.assert_close(part.upper.T @ part.upper @ hessian, torch.eye(len(hessian)), rtol=0, atol=1e-3)


def test_compensations_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MAX_BYTES", 4 * 192 * 70)
    parts = compensations(correlated(300, 192), 16)
    assert [part.start for part in parts] == [0, 64, 128]
    assert sum(part.upper.nbytes for part in parts) <= 4 * 192 * 70


def test_groups_are_whole_blocks_of_about_equal_size() -> None:
    def cut(columns: int, block: int, most: int) -> list[tuple[int, int]]:
        return list(_cut(columns, block, most))

    assert cut(4096, 128, 4096) == [(0, 4096)]
    assert cut(6144, 128, 4096) == [(0, 3072), (3072, 6144)]
    for columns in (13696, 23040, 128, 256):
        edges = cut(columns, 128, 4096)
        assert edges[0][0] == 0 and edges[-1][1] == columns
        assert all(a[1] == b[0] for a, b in pairwise(edges))
        assert all(0 < stop - start <= 4096 and start % 128 == 0 for start, stop in edges)
    assert cut(96, 16, 40) == [(0, 32), (32, 64), (64, 96)]
    assert cut(64, 32, 16) == [(0, 32), (32, 64)]  # a block is never cut


def test_dead_and_zero_inputs() -> None:
    inputs = correlated(64, 64)
    inputs[:, 5] = 0
    weight = correlated(8, 64, seed=1)
    for x in (inputs, torch.zeros(4, 64)):
        found = dequantize(compensate(weight, Scheme(4, 32), compensations(x, 32)), Scheme(4, 32))
        assert found.isfinite().all()
        assert (found - weight).abs().max() < weight.abs().max()


@pytest.fixture(scope="module")
def demo() -> tuple[Glm4Config, Checkpoint]:
    folder = locate(None).folder
    return read_config(folder / "config.json"), Checkpoint.open(folder)


class Replaced:
    """A checkpoint some of whose tensors are others."""

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        self.checkpoint, self.replaced, self.tensors = checkpoint, tensors, checkpoint.tensors

    def read(self, name: str, window: Sequence[tuple[int, int]]) -> Tensor:
        if name in self.replaced:
            return self.replaced[name][tuple(slice(*bounds) for bounds in window)].clone()
        return self.checkpoint.read(name, tuple(window))


def mean_kl(config: Glm4Config, checkpoint: Checkpoint, tensors: dict[str, Tensor], texts: list[Text]) -> float:
    other: Any = Replaced(checkpoint, tensors)
    wanted = reference_logits(config, checkpoint, texts)
    found = reference_logits(config, other, texts)
    return float(np.mean([kl_divergence(w, f).mean() for w, f in zip(wanted, found, strict=True)]))


def test_calibration_lowers_the_divergence_on_text_it_has_not_seen(
    demo: tuple[Glm4Config, Checkpoint], tmp_path: Path
) -> None:
    config, checkpoint = demo
    text = (checkpoint.folder / "heldout.txt").read_text(encoding="utf-8")
    half = len(text) // 2
    seen = token_sequences(text[:half], checkpoint.folder, tokens=2048)
    texts = [Text(ids, 0) for ids in token_sequences(text[half:], checkpoint.folder, tokens=768)]
    scheme = Scheme(4, 128)
    observed = calibrate(
        config, checkpoint, seen, lambda name: None if "embed" in name or name == "lm_head.weight" else scheme, tmp_path
    )
    done = observed.calibration
    assert len(done.schemes) == 6 * config.num_hidden_layers
    assert "lm_head.weight" not in done
    shapes = {name: checkpoint.tensors[name].shape for name in done.schemes}
    calibrated = {n: dequantize(done.quantized(n, (0, rows)), scheme) for n, (rows, _) in shapes.items()}
    plain = {
        n: dequantize(quantize(checkpoint.read(n, ((0, r), (0, c))), scheme), scheme) for n, (r, c) in shapes.items()
    }
    assert mean_kl(config, checkpoint, calibrated, texts) < 0.88 * mean_kl(config, checkpoint, plain, texts)


@pytest.mark.parametrize("tied", [False, True])
def test_streams_in_windows_and_pads(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear once; sequences of any lengths; windows of rows give what whole linears give."""
    folder = checkpoints.save(checkpoints.random_model(tie_word_embeddings=tied), tmp_path / "checkpoint")
    config, checkpoint = read_config(folder / "config.json"), Checkpoint.open(folder)
    sequences = [list(range(20)), [7, 3, 5], list(range(60, 30, -1))]
    schemes = {"down_proj": Scheme(4, 64, symmetric=False), "q_proj": None}
    read: list[int] = []

    def scheme_for(name: str) -> Scheme | None:
        return schemes.get(name.split(".")[-2], Scheme(8, 32))

    def run(name: str) -> tuple[Path, Calibration]:
        (tmp_path / name).mkdir()
        done = calibrate(config, checkpoint, sequences, scheme_for, tmp_path / name, read.append)
        return tmp_path / name, done.calibration

    whole, done = run("whole")
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    names = {name for name in checkpoint.tensors if name.endswith("_proj.weight") and "q_proj" not in name} | {head}
    assert set(done.schemes) == names == {path.stem for path in whole.iterdir()}
    assert done.schemes[next(name for name in names if "down_proj" in name)] == schemes["down_proj"]
    linears = observe.linears(config, checkpoint)
    assert set(linears) == {name for name in checkpoint.tensors if name.endswith("_proj.weight")} | {head}
    assert sum(read) == sum(4 * np.prod(checkpoint.tensors[name].shape) for name in linears)

    real = observe.windows
    monkeypatch.setattr(observe, "windows", lambda shape: real(shape, 1000))
    _, again = run("windowed")
    for name in names:
        rows, columns = checkpoint.tensors[name].shape
        a, b = (dequantize(each.quantized(name, (0, rows)), each.schemes[name]) for each in (done, again))
        part = done.quantized(name, (3, 9))
        assert torch.equal(dequantize(part, done.schemes[name]), a[3:9])
        original = checkpoint.read(name, ((0, rows), (0, columns))).float()
        errors = [float((x - original).square().mean() / original.square().mean()) for x in (a, b)]
        assert errors[0] < 0.1  # and not the same bits: a sum in another order may turn a rounding, and what follows
        assert errors[1] == pytest.approx(errors[0], rel=0.1)


def calibrated_bytes(checkpoint: Path, out: Path) -> dict[str, bytes]:
    """What calibration with 512 tokens writes."""
    config = read_config(checkpoint / "config.json")
    sequences = np.random.default_rng(0).integers(0, config.vocab_size, (4, 128)).tolist()
    calibrate(config, Checkpoint.open(checkpoint), sequences, lambda name: Scheme(4, 32), out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    """Large enough that BLAS and LAPACK share the work among threads; as many threads in both."""
    model = checkpoints.random_model(hidden_size=512, intermediate_size=768, num_hidden_layers=1)
    folder = checkpoints.save(model, tmp_path / "checkpoint")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = calibrated_bytes(folder, tmp_path / "here")
    there = multiprocessing.get_context("spawn").Process(
        target=_calibrate_there, args=(folder, tmp_path / "there", torch.get_num_threads())
    )
    there.start()
    there.join()
    assert there.exitcode == 0
    assert len(here) == 2 * (6 + 1)  # data and scales of a layer's linears and the head
    assert here == {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}


def _calibrate_there(checkpoint: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    calibrated_bytes(checkpoint, out)


def test_token_sequences(demo: tuple[Glm4Config, Checkpoint], tmp_path: Path) -> None:
    _, checkpoint = demo
    text = (checkpoint.folder / "heldout.txt").read_text(encoding="utf-8")
    sequences = token_sequences(text, checkpoint.folder, tokens=700, length=256)
    assert [len(ids) for ids in sequences] == [256, 256]
    with pytest.raises(UserError, match="the calibration text has 1 tokens; give at least 256, better 4096"):
        token_sequences("ab", checkpoint.folder)
    with pytest.raises(UserError, match=r"tokenizer.json: not found"):
        token_sequences(text, tmp_path)
