"""Which task a checkpoint has, and its labels: as transformers reads them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4Config

from glm4export.sources.config_json import ARCHITECTURES
from glm4export.sources.task import Task, read_task
from glm4graphs.encoder import FEATURES as FEATURES_OF_GRAPHS
from glm4graphs.encoder import HEADS, POOLINGS, Encoding
from glm4runtime.contract import FEATURES, TASKS, UserError, encoder_spec
from tests.helpers.configs import config_of

SEQUENCE, TOKENS = "Glm4ForSequenceClassification", "Glm4ForTokenClassification"


def task_of(architecture: str, wanted: Any = "auto", options: Any = None, **config: Any) -> Task:
    data = {**config_of(**config), "architectures": [architecture]}
    return read_task(data, "some/config.json", wanted, **(options or {}))


def test_the_words_are_the_contract_s() -> None:
    assert set(ARCHITECTURES.values()) == set(TASKS)
    assert {FEATURES_OF_GRAPHS, *HEADS} == set(TASKS) - {"causal-lm"} and FEATURES == FEATURES_OF_GRAPHS
    assert POOLINGS == encoder_spec.POOLINGS


@pytest.mark.parametrize(("architecture", "task"), ARCHITECTURES.items())
def test_the_class_tells_the_task(architecture: str, task: str) -> None:
    assert task_of(architecture).name == task
    assert task_of(architecture, FEATURES).encoding == Encoding(FEATURES)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_labels": 1},
        {"num_labels": 5},
        {"id2label": {0: "no", 1: "yes", 2: "perhaps"}},
        {"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1}},
    ],
)
def test_labels_are_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    wanted = Glm4Config(**config)
    Glm4Config(**config, vocab_size=96).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    geometry = config_of()
    for name in ("id2label", "label2id", "num_labels"):
        geometry.pop(name, None)
        if name in data:
            geometry[name] = data[name]
    task = read_task({**geometry, "architectures": [TOKENS]}, "some/config.json")
    assert task.encoding is not None and task.encoding.num_labels == len(task.labels) == wanted.num_labels
    assert dict(enumerate(task.labels)) == wanted.id2label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 0}, "num_labels=0 must be a whole number from 1 to"),
        ({"num_labels": True}, "num_labels=True must be a whole number"),
        ({"id2label": ["a"]}, r"id2label=\['a'\] must be an object of texts by number"),
        ({"id2label": {"0": 1}}, "id2label=.* must be an object of texts by number"),
        ({"id2label": {"1": "a", "2": "b"}}, r"id2label's keys \['1', '2'\] must be 0 to 1"),
        ({"id2label": {"0": "a"}, "num_labels": 3}, "num_labels=3, and id2label has 1; keep the right one"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not one of single_label_classification, multi"),
        (
            {"problem_type": "single_label_classification", "num_labels": 1, "id2label": None},
            "problem_type='single_label_classification' with one label",
        ),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label names several labels 'a', whose scores nobody could"),
        ({"pad_token_id": 96}, "pad_token_id is 96, expected a token id below vocab_size=96: the last token"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x', expected a token id"),
        ({"pad_token_id": ...}, "pad_token_id is missing, expected a token id"),
    ],
)
def test_refusals_name_key_value_and_remedy(change: dict[str, Any], message: str) -> None:
    data = {**config_of(), "architectures": [SEQUENCE], **change}
    data = {name: value for name, value in data.items() if value is not ...}
    with pytest.raises(UserError, match=f"^some/config.json: {message}"):
        read_task(data, "some/config.json")


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (SEQUENCE, {"pooling": "mean"}, "--pooling mean goes with --task features, not with sequence-classification"),
        ("Glm4ForCausalLM", {"normalize": True}, "--normalize goes with --task features, not with causal-lm"),
        ("Glm4Model", {"normalize": True}, "--normalize needs --pooling last or mean"),
    ],
)
def test_options_of_another_task(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(architecture, options=options)


def test_a_pad_token_that_is_none() -> None:
    task = task_of(SEQUENCE, pad_token_id=None, num_labels=3)
    assert task.encoding == Encoding("sequence-classification", 3, None) and task.pad is None
    assert task_of(SEQUENCE, pad_token_id=7, num_labels=3).encoding == Encoding("sequence-classification", 3, 7)
