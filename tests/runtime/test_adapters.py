"""Adapters that a session chooses by request: peft's model, or the build that merged them, is the reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from glm4export.build.options import BuildOptions
from glm4runtime import Session, load
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.contract import UserError, past_name, present_name
from tests.helpers import adapters
from tests.helpers.adapters import AdaptedModel, cli

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOKENS = [5, 9, 40, 3, 77, 21, 8, 60, 33]


@pytest.fixture(scope="module")
def session(adapted: AdaptedModel) -> Session:
    return load(adapted.bundle, adapters=adapted.files)


def logits(session: Session, name: str | None) -> np.ndarray:
    """Of a prompt, of a step and of a draft, behind every one of their tokens but the prompt's first."""
    runner = session.runner
    runner.use_adapter(name)
    runner.rewind()
    rows = [runner.prefill(TOKENS[:4]).copy()[None], runner.decode(TOKENS[4]).copy()[None]]
    return np.concatenate([*rows, runner.verify(TOKENS[5:]).copy()])


def expected(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0, 3:].numpy()
    return found


def test_prompts_steps_and_drafts_are_pefts(adapted: AdaptedModel, session: Session) -> None:
    assert session.adapters == ("wide", "narrow")
    for name in (None, "wide", "narrow", None, "narrow", "wide"):
        assert np.abs(logits(session, name) - expected(adapted.reference(name))).max() <= 2e-5, name
    apart = np.abs(expected(adapted.reference("wide")) - expected(adapted.reference("narrow"))).max()
    assert apart > 0.1


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_other_precisions_are_no_further_from_peft_than_their_base(precision: str, adapted: AdaptedModel) -> None:
    """The side paths aren't quantized: what is off with an adapter is the base's rounding, measured without one.

    An adapter's activations round otherwise, so it may be half as large again. And along the way that peft's logits
    move, these move as far: an adapter that isn't there goes 0 of it, one twice as strong 2.
    """
    with load(adapted.build(precision), adapters=adapted.files) as session:
        found = {name: logits(session, name) for name in (None, *adapters.CONFIGS)}
    wanted = {name: expected(adapted.reference(name)) for name in found}
    rounding = rms(found[None] - wanted[None])
    for name in adapters.CONFIGS:
        assert rms(found[name] - wanted[name]) <= 1.5 * rounding, name
        way = (wanted[name] - wanted[None]).ravel()
        assert (found[name] - found[None]).ravel() @ way / (way @ way) == pytest.approx(1, abs=0.25), name


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def test_without_an_adapter_it_is_the_base_bundle_to_the_bit(adapted: AdaptedModel, session: Session) -> None:
    plain = adapted.folder / "plain"
    assert cli("build", adapted.checkpoint, "-o", plain, "--target", "cpu", "--precision", "fp32") == 0
    assert json.loads((plain / "manifest.json").read_text()).get("lora") is None
    with load(plain) as base, load(adapted.bundle) as unused:
        wanted = logits(base, None)
        assert np.array_equal(logits(unused, None), wanted)
        logits(session, "wide")
        assert np.array_equal(logits(session, None), wanted)


def test_a_row_of_a_batch_has_an_adapter_of_its_own(adapted: AdaptedModel, session: Session) -> None:
    """Whatever its neighbours use: rows of a batch are, to the bit, those of a batch that uses one adapter."""
    runner = session.runner
    assert isinstance(runner, OrtRunner) and runner.pool is not None

    def step(names: list[str | None]) -> np.ndarray:
        assert runner.pool is not None
        selected, binding = runner.pool.select(names), runner.graphs["prefill"].io_binding()
        count, cache = len(names), adapted.model.config
        selected.bind(binding)
        pool = [np.zeros((count, cache.num_key_value_heads, 64, cache.head_dim), np.float32) for _ in range(4)]
        for index, (layer, part) in enumerate([(0, "key"), (0, "value"), (1, "key"), (1, "value")]):
            for bind, name in ((binding.bind_input, past_name), (binding.bind_output, present_name)):
                bind(name(layer, part), "cpu", 0, np.float32, pool[index].shape, pool[index].ctypes.data)
        binding.bind_cpu_input("input_ids", np.full((count, 1), TOKENS[0]))
        binding.bind_cpu_input("attention_mask", np.ones((count, 1), np.int64))
        binding.bind_cpu_input("logit_rows", np.zeros((count, 1), np.int64))
        binding.bind_output("logits")
        runner.graphs["prefill"].run_with_iobinding(binding)
        rows: np.ndarray = binding.get_outputs()[-1].numpy()[:, 0]
        return rows

    mixed: list[str | None] = ["narrow", None, "wide", "narrow"]
    rows = step(mixed)
    for row, name in zip(rows, mixed, strict=True):
        assert np.array_equal(row, step([name] * 4)[0]), name
        with torch.no_grad():
            wanted = adapted.reference(name)(torch.tensor([TOKENS[:1]])).logits[0, 0].numpy()
        assert np.abs(row - wanted).max() <= 2e-5, name


def test_each_request_has_its_own(adapted: AdaptedModel, session: Session) -> None:
    """The cache of one is no other's, nor is a generation continued that lost it."""
    texts = {name: list(session.generate(TOKENS, adapter=name)) for name in (None, *adapters.CONFIGS)}
    assert len({tuple(text) for text in texts.values()}) == 3
    for name in ("narrow", None, "wide"):
        assert list(session.generate(TOKENS, adapter=name, lookup=7)) == texts[name]
    again = session.generate(TOKENS, adapter="wide")
    assert again.reused_tokens > 0
    with pytest.raises(UserError, match=r"adapter 'widest' is not known; loaded: 'wide', 'narrow'"):
        session.generate(TOKENS, adapter="widest")
    assert list(again) == texts["wide"]
    with torch.no_grad():
        tokens = torch.tensor([TOKENS])
        wanted = adapted.reference("narrow")(tokens, labels=tokens).loss
    assert session.loss(TOKENS, adapter="narrow") == pytest.approx(float(wanted), abs=1e-5)
    scores = session.score(TOKENS[:5], [TOKENS[5:]], adapter="narrow")
    assert scores != session.score(TOKENS[:5], [TOKENS[5:]])


def test_what_sessions_cannot_load_is_refused(adapted: AdaptedModel, capsys: pytest.CaptureFixture[str]) -> None:
    merge = "build the bundle with --lora, which merges it"
    for config, message in (
        ({"use_dora": True}, f"use_dora=True rescales every row of .*, which sums can't; {merge}"),
        ({"modules_to_save": ["lm_head"]}, rf"lm_head.weight was trained whole \(.*\), not as a product; {merge}"),
        ({"lora_bias": True}, f"lora_bias=True adds to .*q_proj.bias, and side paths have no biases; {merge}"),
        ({"target_modules": ["lm_head"]}, rf"holds lm_head.weight itself beside its matrices, .* else {merge}"),
        ({"r": 5}, r"its rank is 5, .* was built for up to 4; build it with --lora-rank 5"),
    ):
        folder = adapted.folder / "refused"
        adapters.train(adapted.model, folder, **{"r": 2, "target_modules": ["q_proj"], **config})
        capsys.readouterr()
        assert cli("adapter", adapted.bundle, folder, "-o", adapted.folder / "none") == 2
        assert re.search(message, capsys.readouterr().err), config
        assert not (adapted.folder / "none").exists()


def test_files_that_are_not_for_the_bundle_are_refused(adapted: AdaptedModel, tmp_path: Path) -> None:
    good = adapted.files["wide"].read_bytes()
    again = "make it again with `glm4export adapter`"
    for data, message in (
        (b"", f"not an adapter of `glm4export adapter`, or cut off; {again}"),
        (good[:-4], "its tensors take .* bytes, the file holds"),
        (good[:-1] + bytes([good[-1] ^ 1]), "its data's sha256 is .*, not .* as it says itself"),
        (good.replace(b"qkv_proj", b"abc_proj"), "no side path is called 'lora.0.abc_proj.A'"),
        ((adapted.adapters["wide"] / adapters.WEIGHTS).read_bytes(), "format is 'pt', expected 'glm4export-adapter-1'"),
    ):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(UserError, match=message):
            load(adapted.bundle, adapters={"bad": tmp_path / "bad"})
    many = dict.fromkeys("abcd", adapted.files["wide"])
    with pytest.raises(UserError, match=r"4 adapters \(a, b, c, d\), and the bundle was built for 3; .*--lora-slots 4"):
        load(adapted.bundle, adapters=many)
    with pytest.raises(UserError, match="adapters: x is 3, expected the path of a file"):
        load(adapted.bundle, adapters={"x": 3})  # type: ignore[dict-item]


def test_another_base_model_is_refused(adapted: AdaptedModel, tmp_path: Path) -> None:
    tensors = load_file(adapted.files["wide"])
    header = json.loads(adapted.files["wide"].read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    facts = header["__metadata__"]
    save_file(tensors, tmp_path / "other", metadata={**facts, "base": "another"})
    with pytest.raises(UserError, match="made for a base model of fingerprint 'another', the bundle's is"):
        load(adapted.bundle, adapters={"other": tmp_path / "other"})


def test_inspect_tells_of_the_slots(adapted: AdaptedModel, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli("inspect", adapted.bundle) == 0
    assert "  adapters   up to 3 at once, of rank 4 at most\n" in capsys.readouterr().out


def test_options_that_do_not_go_with_slots() -> None:
    for options, message in (
        ({"target": "tensorrt", "lora_slots": 2}, "--lora-slots does not go with --target tensorrt"),
        ({"lora_slots": 0}, r"--lora-slots 0 is not in 1\.\."),
        ({"lora_slots": 1, "lora_rank": 1000}, r"--lora-rank 1000 is not in 1\.\."),
        ({"lora_rank": 8}, "--lora-rank goes with --lora-slots N"),
    ):
        with pytest.raises(UserError, match=message):
            BuildOptions(**options)  # type: ignore[arg-type]
