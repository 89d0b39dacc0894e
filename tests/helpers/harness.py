"""lm-evaluation-harness over small task files of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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


def evaluated(model: Any, folder: Path) -> dict[str, Any]:
    """What the harness finds of a model of its own kind, on all of :data:`TASKS`. folder: for files of ours."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    data = json.dumps({"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")})
    for name, text in TASKS.items():
        lines = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {data}", "test_split: test"]
        body = [line.strip() for line in text.strip().splitlines()]
        (folder / f"{name}.yaml").write_text("\n".join([*lines, *body]), encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    return results


def metrics(results: dict[str, Any], task: str) -> dict[str, float]:
    """A task's numbers by their names."""
    return {name: value for name, value in results["results"][task].items() if isinstance(value, float)}


def require_alike(found: dict[str, Any], expected: dict[str, Any], task: str) -> None:
    """Assert that two models have the same figures, log-likelihoods and answers."""
    figures = metrics(found, task)
    assert figures and figures == pytest.approx(metrics(expected, task), rel=1e-4)
    for one, other in zip(found["samples"][task], expected["samples"][task], strict=True):
        for response, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert response == (wanted if isinstance(wanted, str) else pytest.approx(wanted, abs=1e-3))
