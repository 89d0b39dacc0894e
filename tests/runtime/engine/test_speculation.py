"""Guesses in the engine, by prompt lookup and by a draft bundle: the same tokens, with fewer runs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import Engine, Request, SamplingParams, UserError, load
from glm4runtime.backends.ort_batch import OrtBatchRunner
from glm4runtime.backends.settings import Settings
from glm4runtime.contract import BundleError, read_manifest
from glm4runtime.engine import Result
from glm4runtime.engine.draft_bundle import DraftBundle
from glm4runtime.text.structure import Structure
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.edits import edit
from tests.runtime.engine.conftest import LoadEngine

GUESSES: list[dict[str, Any]] = [{"lookup": 7}, {"draft": 7}, {"draft": 4}]
GREEDY = SamplingParams(max_new_tokens=30, min_new_tokens=30)
SEEDED = SamplingParams(max_new_tokens=30, min_new_tokens=30, temperature=0.8, seed=3)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 2000, length).tolist()


def answered(engine: Engine, ids: list[int], params: SamplingParams, **settings: Any) -> Result:
    return engine.generate(Request(ids, params=params, **settings)).result()


@pytest.fixture
def a_run_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do all guesses for one: decisions by time are the same on every machine."""
    seconds = itertools.count()
    for name in ("draft", "slot_runner"):
        monkeypatch.setattr(f"glm4runtime.engine.{name}.perf_counter", lambda: float(next(seconds)))


@pytest.fixture(scope="module")
def stranger(build_bundle: Build) -> Path:
    """A random model of the embedded one's vocabulary, with 128 positions."""
    return build_bundle(
        checkpoints.random_model(vocab_size=2048, max_position_embeddings=128), target="cpu", precision="fp32"
    )


def test_a_limit_on_memory_holds_for_both(stranger: Path, demo_bundles: dict[str, Path]) -> None:
    """Each has its caches, and the rest in shares of the weights."""
    model, draft = read_manifest(demo_bundles["fp32"]), read_manifest(stranger)
    bundle = DraftBundle(stranger, draft, model)
    settings = Settings(provider="cuda", gpu_mem_limit=2.0, max_seq_len=256, invariant=True, cuda_graphs=True)
    caches = 4 * 128 * draft.cache.bytes_per_token, 5 * 256 * model.cache.bytes_per_token  # one for fillers
    own, theirs = (manifest.files["weights.bin"].size for manifest in (draft, model))
    kept = bundle.leave_room(settings, slots=4)
    share = (caches[0] + (2e9 - sum(caches)) * own / (own + theirs)) / 1e9
    assert kept == replace(settings, gpu_mem_limit=pytest.approx(2 - share))
    assert bundle._settings == Settings(provider="cuda", max_seq_len=256, gpu_mem_limit=pytest.approx(share))
    told = r"gpu_mem_limit=0\.0001 GB: the caches alone take 0\.\d\d GB, the draft's among them 0\.\d\d; give more, or"
    with pytest.raises(UserError, match=told):
        bundle.leave_room(replace(settings, gpu_mem_limit=1e-4), slots=4)
    layers = model.cache.layers
    split = DraftBundle(stranger, draft, replace(model, stages=(1, layers - 1)))  # with the draft: one layer alone
    kept = split.leave_room(replace(settings, device_id=[1, 0]), slots=4)
    theirs, caches = theirs / layers, (caches[0], caches[1] / layers)
    share = (caches[0] + (2e9 - sum(caches)) * own / (own + theirs)) / 1e9
    assert kept.gpu_mem_limit == pytest.approx(2 - share) and split._settings.device_id == 1
    with pytest.raises(UserError, match="gpu_mem_limit is for cuda, this session runs on cpu; leave it out"):
        Engine.load(demo_bundles["fp32"], draft=stranger, gpu_mem_limit=1.0)


def test_a_draft_that_does_not_open_leaves_no_model_open(
    stranger: Path, demo_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[OrtBatchRunner] = []

    def fail(*_: object, **__: object) -> None:
        raise UserError("no")

    close = OrtBatchRunner.close
    monkeypatch.setattr(OrtBatchRunner, "close", lambda runner: (closed.append(runner), close(runner)))
    monkeypatch.setattr(DraftBundle, "open", fail)
    with pytest.raises(UserError, match="no"):
        Engine.load(demo_bundles["fp32"], draft=stranger, max_seq_len=64)
    assert len(closed) == 1


@pytest.mark.parametrize("kernel", ["fp32", "int4"])
def test_to_the_end_of_a_slot(load_engine: LoadEngine, kernel_bundles: Callable[[str], Path], kernel: str) -> None:
    bundle = kernel_bundles(kernel)
    engine = load_engine(bundle, draft=bundle, max_seq_len=64, threads=1)
    with load(bundle, invariant=True, max_seq_len=64, prefill_chunk=32, threads=1) as session:
        for length, params in ((47, GREEDY), (48, SEEDED), (63, SEEDED), (64, GREEDY)):
            stream = session.generate(prompt(length), params)
            wanted = list(stream)
            plain = answered(engine, prompt(length), params).choices[0]
            assert (len(wanted), stream.finish_reason) == (64 - length + 1, "length")
            assert (len(plain.tokens), plain.finish_reason) == (len(wanted), "length")
            for settings in GUESSES:
                found = answered(engine, prompt(length), params, **settings).choices[0]
                assert (list(found.tokens), found.finish_reason) == (wanted, "length"), (length, settings)


def test_an_own_draft_is_nearly_always_right(
    load_engine: LoadEngine, demo_bundles: dict[str, Path], a_run_takes_a_second: None
) -> None:
    engine = load_engine(draft=demo_bundles["fp32"], threads=1)
    ids = prompt(70)  # read in two chunks and a rest
    with load(demo_bundles["fp32"], invariant=True, max_seq_len=256, prefill_chunk=32, threads=1) as session:
        wanted = list(session.generate(ids, GREEDY))
    result = answered(engine, ids, GREEDY, draft=7)
    assert list(result.choices[0].tokens) == wanted
    # Of 30 tokens one is the prompt's, and a few are plain runs: while it reads, and to know what they take.
    assert result.usage.drafted_tokens - 8 <= result.usage.accepted_tokens
    assert result.usage.accepted_tokens >= 18
    assert engine.stats().accepted_tokens == result.usage.accepted_tokens
    two = answered(engine, ids, SEEDED, draft=7, n=2)
    for seed, choice in enumerate(two.choices, 3):
        alone = SamplingParams(max_new_tokens=30, min_new_tokens=30, temperature=0.8, seed=seed)
        assert choice.tokens == answered(engine, ids, alone, lookup=3).choices[0].tokens
    assert 0 < two.usage.accepted_tokens <= two.usage.drafted_tokens


def test_a_draft_that_is_never_right_is_given_up(
    load_engine: LoadEngine, stranger: Path, a_run_takes_a_second: None
) -> None:
    engine = load_engine(draft=stranger, threads=1)
    long = SamplingParams(max_new_tokens=100, min_new_tokens=100)
    for ids in (prompt(20), prompt(100), prompt(150)):  # the second outgrows the draft's positions, the third has
        wanted = answered(engine, ids, long, lookup=1)
        found = answered(engine, ids, long, draft=7)
        assert found.choices == wanted.choices
        # Two runs until it's known what guesses take, shorter ones until they're given up, and one for 64 tokens more.
        assert (0 if len(ids) == 150 else 14) <= found.usage.drafted_tokens <= 45
        assert found.usage.accepted_tokens <= 2


def test_answers_beside_each_other(
    load_engine: LoadEngine, demo_bundles: dict[str, Path], a_run_takes_a_second: None
) -> None:
    engine = load_engine(draft=demo_bundles["fp32"], threads=1, slots=3)
    requests = [Request(prompt(9 + 11 * i, i), params=GREEDY, **GUESSES[i % 3]) for i in range(6)]
    alone = [engine.generate(request).result().choices for request in requests]
    handles = [engine.submit(request) for request in requests]
    cancelled = engine.submit(Request(prompt(50, 9), params=GREEDY, draft=15))
    next(cancelled)
    cancelled.cancel()
    assert [handle.result().choices for handle in handles] == alone


@pytest.mark.parametrize("name", ["verify", "prefill"])
def test_a_request_outlives_its_draft(
    load_engine: LoadEngine, demo_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = load_engine(draft=demo_bundles["fp32"], threads=1)
    wanted = answered(engine, prompt(40), GREEDY, lookup=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("the graph failed")

    monkeypatch.setattr(engine._worker.loop.draft.runner, name, fail)
    found = answered(engine, prompt(40), GREEDY, draft=7)
    assert found.choices == wanted.choices and found.usage.drafted_tokens == 0
    assert engine.stats().healthy


def test_structured_answers(load_engine: LoadEngine, demo_bundles: dict[str, Path], a_run_takes_a_second: None) -> None:
    engine = load_engine(draft=demo_bundles["fp32"], threads=1)
    structure = Structure(regex='\\[("[a-f]{3}", ){8}"end"\\]')
    texts = set()
    for settings in ({}, *GUESSES):
        params = SamplingParams(max_new_tokens=150)
        found = answered(engine, prompt(30), params, structure=structure, **settings)
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.drafted_tokens > 0 or not settings
        texts.add(found.choices[0].content)
    assert len(texts) == 1 and len(json.loads(texts.pop())) == 9


def test_what_is_refused(load_engine: LoadEngine, demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lookup=1 goes with no draft=2: give one of them"):
        Request([1], lookup=1, draft=2)
    with pytest.raises(UserError, match="draft: expected a whole number of draft tokens from 0 to 15, found 16"):
        Request([1], draft=16)
    with pytest.raises(UserError, match="num_beams=2 goes with no draft"):
        Request([1], num_beams=2, draft=2)
    with pytest.raises(UserError, match="draft=3, and the engine has no draft bundle; load it with draft="):
        load_engine().submit(Request([1], draft=3))
    with pytest.raises(UserError, match=r"draft=5 is not the path of a folder"):
        load_engine(draft=5)
    with pytest.raises(BundleError, match=r"missing\b"):
        load_engine(draft=tmp_path / "missing")
    other = shutil.copytree(demo_bundles["fp32"], tmp_path / "other")
    manifest = (other / "manifest.json").read_text(encoding="utf-8")
    edit(other / "manifest.json", vocab_size=96)
    with pytest.raises(BundleError, match="a draft of 96 tokens, for a bundle of 2048; a draft needs the same token"):
        load_engine(draft=other)
    (other / "manifest.json").write_text(manifest, encoding="utf-8")
    path = other / "tokenizer.json"
    content, size = json.loads(path.read_text(encoding="utf-8")), path.stat().st_size  # which the manifest has
    path.write_text(json.dumps(content).ljust(size), encoding="utf-8")  # other bytes, the same tokens
    load_engine(draft=other, threads=1).close()
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content).ljust(size), encoding="utf-8")
    with pytest.raises(
        BundleError, match=r"not the tokenizer of .*: 2 tokens have other ids, .* 0 in place of 1; a dr"
    ):
        load_engine(draft=other)
