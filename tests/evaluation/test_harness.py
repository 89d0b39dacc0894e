"""lm-evaluation-harness drives a bundle: its own Hugging Face model over the same checkpoint is the reference."""

from __future__ import annotations

import json
import runpy
from typing import Any

import pytest

from glm4export.evaluation.harness import BundleLM
from glm4runtime import SamplingParams, Session
from glm4runtime.contract import UserError
from tests.helpers.demo import DEMO

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a river"], "answer": 0},
    {"question": "The capital of Italy is", "choices": ["Berlin", "Rome", "London"], "answer": 1},
    {"question": "Two and two make", "choices": ["five", "a cat", "four"], "answer": 2},
]

TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}} {{choices[answer]}}."
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
    "answers": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(scope="module")
def results(demo_sessions: dict[str, Session], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both models' results on task files of ours, by model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    data = json.dumps({"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")})
    for name, text in TASKS.items():
        lines = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {data}", "test_split: test"]
        body = [line.strip() for line in text.strip().splitlines()]
        (folder / f"{name}.yaml").write_text("\n".join([*lines, *body]), encoding="utf-8")
    ours = BundleLM(demo_sessions["fp32"].folder)
    theirs = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", prefix_token_id=ours.prefix_token_id)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return {
        name: lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        for name, model in (("ours", ours), ("theirs", theirs))
    }


def metrics(results: dict[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in results["results"][task].items() if isinstance(value, float)}


@pytest.mark.parametrize("task", TASKS)
def test_the_figures_are_those_of_the_harness_s_own_model(results: dict[str, dict[str, Any]], task: str) -> None:
    found, expected = metrics(results["ours"], task), metrics(results["theirs"], task)
    assert found and found == pytest.approx(expected, rel=1e-4)


def test_every_log_likelihood_and_every_answer(results: dict[str, dict[str, Any]]) -> None:
    for task in TASKS:
        pairs = zip(results["ours"]["samples"][task], results["theirs"]["samples"][task], strict=True)
        for found, expected in pairs:
            for one, other in zip(found["filtered_resps"], expected["filtered_resps"], strict=True):
                if isinstance(one, str):
                    assert one == other
                else:
                    assert one == pytest.approx(other, abs=1e-3)


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
