"""``--output-top-logits``: tokens chosen among a row's most probable ones are the tokens of the whole row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from glm4export.bench.measure import _one_sequence
from glm4export.build.options import BuildOptions
from glm4export.passes.give_top_logits import give_top_logits
from glm4export.verification.phases import _decoded
from glm4runtime import Engine, Request, SamplingParams, Session, UserError, load
from glm4runtime.backends import graph_check, top_rows
from glm4runtime.backends import ort as ort_module
from glm4runtime.backends.cache import Buffer
from glm4runtime.backends.held_row import HeldRow
from glm4runtime.backends.top_rows import TopRows
from glm4runtime.contract import BundleError, TensorSpec
from glm4runtime.contract.onnxfile import read_graph
from glm4runtime.sampling import Sampler
from tests.conftest import Build

COUNT = 20
KINDS = {"fp32": "cpu", "fp16": "cuda", "int8": "cpu", "int4": "cuda"}
PROMPT = "The little cat"


@pytest.fixture(scope="module")
def opened(build_bundle: Build) -> Callable[[str], Session]:
    """The embedded model with top logits, in the CPU's kernels."""

    @cache
    def build(precision: str) -> Session:
        bundle = build_bundle(None, precision=precision, target=KINDS[precision], output_top_logits=COUNT)
        return load(bundle, provider="cpu", threads=1)

    return build


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of every token that a held row was asked for, whether the row had to be fetched."""
    fetched: list[bool] = []
    among = Sampler._among

    def noting(sampler: Sampler, row: HeldRow) -> int | None:
        found = among(sampler, row)
        fetched.append(found is None)
        return found

    monkeypatch.setattr(Sampler, "_among", noting)
    yield fetched


@pytest.mark.parametrize("precision", KINDS)
def test_same_tokens(
    precision: str, opened: Callable[[str], Session], chosen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, top-k, top-p and min-p, step by step and with guesses, beside the same session fetching every row."""
    session = opened(precision)
    for sampling, held in (
        ({}, "always"),
        ({"temperature": 1.0, "top_k": COUNT // 2}, "always"),
        ({"temperature": 1.0, "top_k": 10, "top_p": 0.9, "typical_p": 0.9, "xtc_probability": 0.5}, "always"),
        ({"temperature": 0.7, "top_p": 0.6}, "at times"),
        ({"temperature": 1.3, "top_p": 0.2, "min_p": 0.01}, "at times"),
        ({"temperature": 0.9, "min_p": 0.1}, "at times"),
        ({"temperature": 1.0, "top_k": COUNT}, "never"),
        ({"temperature": 1.0}, "never"),
        ({"repetition_penalty": 1.2}, "never"),
    ):
        params = SamplingParams(max_new_tokens=24, seed=5, **sampling)  # type: ignore[arg-type]
        for lookup in (0, 5):
            chosen.clear()
            with monkeypatch.context() as patch:
                patch.setattr(session.runner, "top_count", 0)
                wanted = list(session.generate(PROMPT, params, lookup=lookup))
            assert not chosen
            assert list(session.generate(PROMPT, params, lookup=lookup)) == wanted, (sampling, lookup)
            known = {"always": not any(chosen) and bool(chosen), "never": not chosen, "at times": not all(chosen)}
            assert known[held], (sampling, lookup, chosen)


def test_rows_by_other_ways_are_whole(opened: Callable[[str], Session], demo_sessions: dict[str, Session]) -> None:
    """Losses, verified drafts and an invariant session, beside the bundle without them."""
    plain, top = demo_sessions["fp32"], opened("fp32")
    ids = plain.tokenizer.encode(PROMPT)
    assert top.loss(PROMPT) == plain.loss(PROMPT)
    params = SamplingParams(max_new_tokens=8)
    wanted = list(plain.generate(PROMPT, params))
    assert list(top.generate(PROMPT, params)) == wanted
    for session in (plain, top):
        session.runner.rewind()
        session.runner.prefill(ids)
    assert np.array_equal(top.runner.decode(5), plain.runner.decode(5))
    assert np.array_equal(top.runner.verify([6, 7, 8]), plain.runner.verify([6, 7, 8]))
    rows = top.runner.look_ahead([6, 7, 8], hold=True)
    for row, whole in zip(rows, plain.runner.verify([6, 7, 8]), strict=True):
        assert isinstance(row, HeldRow)
        order = np.argsort(-whole, kind="stable")[:COUNT]  # onnxruntime's CPU kernel: the lower id first
        assert np.array_equal(row.ids, order) and np.array_equal(row.values, whole[order])
        assert row.log_sum == pytest.approx(np.log(np.exp(whole.astype(np.float64)).sum()), abs=1e-5)
        assert np.array_equal(row.fetch(), whole)
    with load(top.folder, threads=1, invariant=True) as invariant:
        assert list(invariant.generate(PROMPT, params)) == wanted


def test_held_rows_lie_apart_from_those_that_are_fetched(
    opened: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, whose buffers are the host's here: a run writes to the one or the other."""
    session = opened("fp32")
    monkeypatch.setattr(top_rows, "Buffer", lambda shape, dtype, *_: Buffer(shape, dtype, "cpu"))
    monkeypatch.setattr(ort_module, "TopRows", lambda *given: TopRows(*given[:3], "cuda", 0))
    with load(session.folder, threads=1) as other:
        runner, host = other.runner, other.runner._logits.array  # type: ignore[attr-defined]
        for one in (session.runner, runner):
            one.rewind()
            one.prefill([5, 6, 7])
        before = host.copy()
        rows = [runner.step(8, hold=True), *runner.look_ahead([9, 10, 11], hold=True)]
        assert np.array_equal(host, before)
        wanted = [session.runner.decode(8).copy(), *session.runner.verify([9, 10, 11]).copy()]
        for row, whole in zip(rows, wanted, strict=True):
            assert isinstance(row, HeldRow) and np.array_equal(row.fetch(), whole)
        assert np.array_equal(runner.verify([9, 10, 11]), wanted[1:]) and not np.array_equal(host, before)


def test_bench_steps_as_generation_does(opened: Callable[[str], Session], chosen: list[bool]) -> None:
    session = opened("fp32")
    session.runner.rewind()
    session.runner.prefill([5, 6, 7])
    step = _one_sequence(session)
    step()
    step()
    assert chosen == [False, False]


@pytest.mark.parametrize("change", [{"ids": [3, 3]}, {"values": [0.0, 0.0]}, {"log_sum": 1.0}])
def test_verify_sees_wrong_ones(
    change: dict[str, Any], opened: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else in it would: logits are right all the same."""
    runner = opened("fp32").runner
    runner.rewind()
    runner.prefill([5, 6, 7])
    right = runner.step(8, hold=True)
    assert isinstance(right, HeldRow)
    wrong = replace(right, **{name: np.array(value)[()] for name, value in change.items()})
    for row, wanted in ((right, nullcontext()), (wrong, pytest.raises(BundleError, match="top_logits, top_ids and"))):
        monkeypatch.setattr(runner, "step", lambda token, hold, row=row: row)
        with wanted:  # type: ignore[attr-defined]
            assert np.array_equal(_decoded(runner, 8), right.fetch())


def test_the_engine_fetches_whole_rows(opened: Callable[[str], Session]) -> None:
    session, params = opened("fp32"), SamplingParams(max_new_tokens=8)
    wanted = list(session.generate(PROMPT, params))
    with Engine.load(session.folder, slots=2, threads=1, invariant=False) as engine:
        request = Request(session.tokenizer.encode(PROMPT), params=params)
        (choice,) = engine.generate(request).result().choices
    assert list(choice.tokens) == wanted


def test_onnxruntime_gives_no_number_for_a_row_without_a_distribution(tmp_path: Path) -> None:
    """So that such a row is fetched, and refused as it always is."""
    from onnx import TensorProto, helper

    node = helper.make_node("ReduceLogSumExp", ["x", "axis"], ["y"], keepdims=0)
    graph = helper.make_graph(
        [node],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "vocab"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows"])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [-1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString())
    rows = np.zeros((4, 9), np.float32)
    rows[0, 3], rows[1, 3], rows[2] = np.nan, np.inf, -np.inf
    (found,) = session.run(None, {"x": rows})
    assert np.isfinite(found).tolist() == [False, False, False, True]


def test_only_the_sessions_own_graph_has_them(opened: Callable[[str], Session]) -> None:
    bundle = opened("fp16").folder
    prefill, decode = (read_graph(bundle / f"{name}.onnx") for name in ("prefill", "decode"))
    assert [(spec.name, spec.dtype, spec.dims[-1]) for spec in prefill.outputs if "." not in spec.name][1:] == [
        ("top_logits", "float32", COUNT),
        ("top_ids", "int64", COUNT),
        ("log_sum_exp", "float32", "rows"),
    ]
    assert [spec.name for spec in decode.outputs if "." not in spec.name] == ["logits"]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"target": "cuda", "output_top_logits": 1}, r"--output-top-logits 1 is not in 2\.\.256"),
        ({"target": "tensorrt", "output_top_logits": 9}, "--output-top-logits does not go with --target tensorrt"),
        (
            {"precision": "int4", "prefill_precision": "int8", "output_top_logits": 9},
            "--output-top-logits does not go with --prefill-precision on --target cpu",
        ),
        (
            {"kv_cache": "int8", "calibrate": Path("text"), "output_top_logits": 9},
            "--output-top-logits does not go with --kv-cache int8 on --target cpu",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**{"precision": "fp16", **options})


def test_a_vocabulary_with_fewer_tokens_is_refused() -> None:
    skeleton: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=64))
    with pytest.raises(UserError, match="--output-top-logits 64 are not fewer than the vocabulary's 64 tokens"):
        give_top_logits(64).rewrite(skeleton)


@pytest.mark.parametrize(
    "outputs",
    [
        [("top_logits", "float32", 4), ("top_ids", "int64", 4)],
        [("top_logits", "float32", 4), ("top_ids", "int64", 5), ("log_sum_exp", "float32", None)],
        [("top_logits", "float32", "K"), ("top_ids", "int64", "K"), ("log_sum_exp", "float32", None)],
        [("top_logits", "float32", 64), ("top_ids", "int64", 64), ("log_sum_exp", "float32", None)],
        [("top_logits", "float16", 4), ("top_ids", "int64", 4), ("log_sum_exp", "float32", None)],
    ],
    ids=["one is missing", "widths differ", "no number", "as many as there are", "another dtype"],
)
def test_a_graph_whose_outputs_do_not_fit_is_refused(outputs: list[tuple[str, str, Any]]) -> None:
    """Buffers are as large as they say."""
    graph: Any = SimpleNamespace(
        outputs=[
            TensorSpec(name, dtype, ("batch", "rows", count) if count else ("batch", "rows"))
            for name, dtype, count in outputs
        ]
    )
    with pytest.raises(
        BundleError, match=r"prefill\.onnx: it gives 'top_logits' float.*; expected top_logits, top_ids"
    ):
        graph_check._require_top_logits(Path("prefill.onnx"), graph, 64)
