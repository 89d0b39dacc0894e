"""Adapters by request: each answer has its own adapter's model, whatever runs beside it; peft is the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm4runtime import Engine, Request, SamplingParams, UserError
from glm4runtime.backends.adapters import AdapterPool
from glm4runtime.contract import read_manifest
from glm4runtime.engine import Delta, Result
from tests.helpers.adapters import AdaptedModel
from tests.runtime.engine.conftest import LoadEngine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NAMES = ("wide", None, "narrow", "wide", "narrow", None, "narrow", "wide")
TOKENS = 6
LONGER = SamplingParams(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
SIZES: dict[str, Any] = {"slots": 8, "max_seq_len": 64, "prefill_chunk": 16, "threads": 1}


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 60, length).tolist()


def request(index: int, **fields: Any) -> Request:
    defaults: dict[str, Any] = {"params": LONGER, "logprobs": 3, "adapter": NAMES[index]}
    return Request(prompt(index, 5 + 3 * index), **{**defaults, **fields})


def answers(results: list[Result]) -> list[Delta]:
    return [result.choices[0] for result in results]


def at_once(engine: Engine, requests: list[Request]) -> list[Delta]:
    return answers([handle.result() for handle in [engine.submit(each) for each in requests]])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_in_any_company_as_alone(precision: str, adapted: AdaptedModel, load_engine: LoadEngine) -> None:
    """Tokens and log-probabilities, to the bit."""
    engine = load_engine(adapted.build(precision), adapters=adapted.files, prefix_cache="off", **SIZES)
    assert list(engine.adapters) == ["wide", "narrow"]
    requests = [request(index) for index in range(8)]
    alone = [at_once(engine, [each])[0] for each in requests]
    assert at_once(engine, requests) == alone
    assert at_once(engine, requests[::-1]) == alone[::-1]
    base = at_once(engine, [replace(each, adapter=None) for each in requests])
    for index, name in enumerate(NAMES):
        assert (base[index] == alone[index]) is (name is None), index
    if precision == "fp32":
        for index, answer in enumerate(alone):
            wanted = log_probabilities(adapted.reference(NAMES[index]), requests[index], answer)
            assert [token.logprob for token in answer.logprobs] == pytest.approx(wanted, abs=2e-5)


def log_probabilities(model: Any, asked: Request, answer: Delta) -> list[float]:
    """Of the answer's tokens."""
    ids = torch.tensor([[*asked.prompt, *answer.tokens]])  # type: ignore[misc]
    with torch.no_grad():
        rows = model(ids).logits[0].log_softmax(-1)
    first = ids.shape[1] - len(answer.tokens)
    return [float(rows[at - 1, ids[0, at]]) for at in range(first, ids.shape[1])]


def test_prefixes_are_an_adapters_own(adapted: AdaptedModel, load_engine: LoadEngine, tmp_path: Path) -> None:
    def load(files: dict[str, Path]) -> Engine:
        return load_engine(adapted.bundle, adapters=files, **{**SIZES, "max_seq_len": 160})

    engine, long = load(adapted.files), prompt(9, 140)
    results = {}
    for name in (None, "wide", "narrow", "wide", None):
        result = engine.generate(Request(long, params=LONGER, logprobs=0, adapter=name)).result()
        assert (result.usage.cached_tokens > 0) is (name in results)
        assert results.setdefault(name, result.choices[0]) == result.choices[0]
    assert len({answer.logprobs for answer in results.values()}) == 3
    engine.save_prefixes(tmp_path / "prefixes")
    swapped = load({"wide": adapted.files["narrow"], "other": adapted.files["wide"]})
    swapped.restore_prefixes(tmp_path / "prefixes")
    for name, before in ((None, None), ("wide", "narrow"), ("other", "wide")):
        result = swapped.generate(Request(long, params=LONGER, logprobs=0, adapter=name)).result()
        assert result.usage.cached_tokens > 0 and result.choices[0].tokens == results[before].tokens


def test_choices_beams_and_lookup_use_it(adapted: AdaptedModel, load_engine: LoadEngine) -> None:
    engine, ids = load_engine(adapted.bundle, adapters=adapted.files, **SIZES), prompt(1, 9)
    model = adapted.reference("narrow")
    wanted = model.generate(
        input_ids=torch.tensor([ids]),
        max_new_tokens=TOKENS,
        num_beams=3,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
    )[0, len(ids) :].tolist()
    beside = [engine.submit(request(index)) for index in (0, 1)]
    beams = engine.generate(Request(ids, params=SamplingParams(max_new_tokens=TOKENS), num_beams=3, adapter="narrow"))
    found = list(beams.result().choices[0].tokens)
    assert found == wanted[: len(found)] and len(found) in (len(wanted), len(wanted) - 1)
    plain = at_once(engine, [request(2, logprobs=None), request(2, logprobs=None, lookup=7)])
    assert plain[0] == plain[1]
    drawn = replace(LONGER, temperature=1.0, seed=3)
    two = engine.generate(request(2, params=drawn, n=2)).result().choices
    for index, choice in enumerate(two):
        (alone,) = at_once(engine, [request(2, params=replace(drawn, seed=3 + index))])
        assert (choice.tokens, choice.logprobs) == (alone.tokens, alone.logprobs)
    assert all(handle.result().choices for handle in beside)


def test_names_that_are_not_loaded(
    adapted: AdaptedModel, load_engine: LoadEngine, demo_bundles: dict[str, Path]
) -> None:
    engine = load_engine(adapted.bundle, adapters=adapted.files, **SIZES)
    for name, shown in (("widest", "'widest'"), ("", "''"), (3, "3"), (["wide"], r"\['wide'\]")):
        with pytest.raises(UserError, match=rf"^adapter {shown} is not known; loaded: 'wide', 'narrow'$"):
            engine.submit(request(0, adapter=name))
    with pytest.raises(UserError, match=r"^adapter 'wide' is not known; none is loaded; give load\(\) adapters="):
        load_engine("fp32").submit(request(0))
    with pytest.raises(UserError, match="has no side paths for adapters; build it with --lora-slots N"):
        load_engine("fp32", adapters=adapted.files)
    with pytest.raises(UserError, match=r"^adapters=\[\] is not a dict of files by name"):
        load_engine(adapted.bundle, adapters=[])


def test_a_step_binds_the_same_rows_whoever_uses_them(adapted: AdaptedModel) -> None:
    """Products over other numbers of rows may add in another order: an answer's bits would tell of its neighbours."""
    pool = AdapterPool(read_manifest(adapted.bundle), "cpu", adapted.files)

    class Binding:
        def __init__(self) -> None:
            self.inputs: dict[str, tuple[Any, ...]] = {}

        def bind_input(self, name: str, *where: Any) -> None:
            self.inputs[name] = where

    selection, binding = pool.every(3), Binding()
    selection.bind(binding)
    assert binding.inputs["lora.0.qkv_proj.A"][3] == (3 * (4 + 3), adapted.model.config.hidden_size)
    gates = selection._gates["lora.gate"]
    for names, rows in (
        ((None, "narrow", "wide"), [[0] * 7, [0] * 4 + [1] * 3, [1] * 4 + [0] * 3]),
        (("wide", None, None), [[1] * 4 + [0] * 3, [0] * 7, [0] * 7]),
    ):
        selection.choose(names)
        assert gates.array[:, 0].tolist() == rows
    assert gates.address == binding.inputs["lora.gate"][4]
