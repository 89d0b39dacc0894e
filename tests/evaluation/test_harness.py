"""lm-evaluation-harness drives a bundle: its own Hugging Face model over the same checkpoint is the reference."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from glm4export.evaluation.harness import BundleLM
from glm4runtime import SamplingParams, Session
from glm4runtime.contract import UserError
from tests.helpers.demo import DEMO
from tests.helpers.harness import TASKS, evaluated, metrics, require_alike


@pytest.fixture(scope="module")
def results(demo_sessions: dict[str, Session], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both models' results on task files of ours, by model."""
    from lm_eval.models.huggingface import HFLM

    ours = BundleLM(demo_sessions["fp32"].folder)
    theirs = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", prefix_token_id=ours.prefix_token_id)
    models = {"ours": ours, "theirs": theirs}
    return {name: evaluated(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.mark.parametrize("task", TASKS)
def test_figures_and_answers_are_those_of_the_harness_s_own_model(
    results: dict[str, dict[str, Any]], task: str
) -> None:
    require_alike(results["ours"], results["theirs"], task)


def test_the_embedded_model_knows_a_capital(results: dict[str, dict[str, Any]]) -> None:
    assert metrics(results["ours"], "choice")["acc,none"] > 0.3


def test_a_context_longer_than_the_cache_loses_its_beginning(demo_sessions: dict[str, Session]) -> None:
    model = BundleLM(demo_sessions["fp32"].folder)
    long = model.tok_encode("and so on ") * model.max_length
    (whole,) = model._loglikelihood_tokens([(None, long, [5, 6])], disable_tqdm=True)
    (cut,) = model._loglikelihood_tokens([(None, long[-(model.max_length - 1) :], [5, 6])], disable_tqdm=True)
    assert whole == cut


def test_sampling_at_temperature_zero_is_greedy(demo_sessions: dict[str, Session]) -> None:
    model = BundleLM(demo_sessions["fp32"].folder)
    greedy = model._generate("The capital of", {"max_gen_toks": 8})
    assert greedy == model._generate("The capital of", {"max_gen_toks": 8, "do_sample": True, "temperature": 0.0})
    assert greedy != model._generate("The capital of", {"max_gen_toks": 8, "do_sample": True, "seed": 1})


def test_the_command_line_tells_of_a_mistake_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: BundleLM("nowhere"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("glm4export.evaluation", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("glm4export: error: nowhere: no such folder; `glm4export build` makes one\n")


def test_an_empty_context_begins_with_the_prefix_token(demo_sessions: dict[str, Session]) -> None:
    model = BundleLM(demo_sessions["fp32"].folder)
    options = {"until": [], "max_gen_toks": 4}
    text = model.session.stream([model.prefix_token_id], SamplingParams(max_new_tokens=4)).read()
    assert model._generate("", options) == text


def test_unknown_arguments_are_refused(demo_sessions: dict[str, Session]) -> None:
    with pytest.raises(UserError, match="model_args: dtype is not known; known: bundle, provider, threads"):
        BundleLM(demo_sessions["fp32"].folder, dtype="float32")
    with pytest.raises(UserError, match="threads='x' is not a whole number"):
        BundleLM(demo_sessions["fp32"].folder, threads="x")  # type: ignore[arg-type]
