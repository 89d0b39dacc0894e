"""docs/config.md names every field, key and argument of transformers' GLM-4, and says what really becomes of each."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4Config
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.glm4 import modeling_glm4
from transformers.utils.generic import TransformersKwargs

from glm4export.sources.config_json import ConfigError, parse_config, read_token_ids
from glm4export.sources.quantized.checkpoint import read_quantization
from glm4export.sources.rope import ROPE_KEYS
from glm4export.sources.task import read_task
from tests.helpers.configs import config_of
from tests.helpers.quantized import AWQ

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"
ELSEWHERE = "other releases of transformers"
CLASSES = ("Glm4Model", "Glm4ForCausalLM", "Glm4ForSequenceClassification", "Glm4ForTokenClassification")
HEADS = CLASSES[1:]


def table(heading: str) -> dict[str, list[str]]:
    """The first table under a heading: the other cells by the name in the first, each name once."""
    text = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = (part for part in text if part.startswith(heading + "\n"))
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section.split("\n\n")[1], re.MULTILINE)
    assert len(rows) == len(dict(rows)) > 10
    return {name: cells.split(" | ") for name, cells in rows}


CONFIG, ROPE, ARGUMENTS = (table(heading) for heading in ("config.json", "Rope", "Arguments of `forward`"))
OTHER: dict[str, Any] = {  # values that must be read, or refused, where the page says so
    "architectures": ["Glm4Model"],
    "quantization_config": AWQ,
    "model_type": "glm",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "relu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 5e5,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 16,
    "eos_token_id": 7,
    "pad_token_id": 7,
    "bos_token_id": 7,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "num_labels": 3,
    "problem_type": "multi_label_classification",
    "dtype": "float16",
    "torch_dtype": "float16",
}


def test_every_field_of_the_config_has_a_row() -> None:
    fields = {field.name for field in dataclasses.fields(Glm4Config)}
    assert fields <= CONFIG.keys()
    # beside the fields: older spellings, and what transformers reads though it is no field
    beside = {"rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "torch_dtype"}
    beside |= {"model_type", "quantization_config", "per_layer_config", "is_causal", "num_labels", "output_attentions"}
    assert CONFIG.keys() - fields <= beside


@pytest.mark.parametrize("field", CONFIG)
def test_a_field_becomes_what_the_page_says(field: str, tmp_path: Path) -> None:
    """A value of another kind for what is ignored, another sound value for what is used."""
    fate = re.split(r"[: ]", CONFIG[field][0])[0]
    data = config_of()
    if field in ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        rope = data.pop("rope_parameters")
        data |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
        if field == "original_max_position_embeddings":
            data["rope_scaling"] = {"type": "yarn", "factor": 2.0}

    if field in ("id2label", "num_labels", "problem_type"):
        data["architectures"] = ["Glm4ForSequenceClassification"]
        data.pop("id2label", None)

    def read(data: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(data))
        geometry = parse_config(copy.deepcopy(data), "c")
        return geometry, read_task(data, "c"), read_token_ids(tmp_path), read_quantization(tmp_path)

    plain = read(data)
    changed = {**data, field: OTHER.get(field, {"a": ["value"]})}
    if fate == "refused" or field == "model_type":
        with pytest.raises(ConfigError, match=field):
            read(changed)
    elif fate == "used":
        assert read(changed) != plain
    else:
        assert fate in ("ignored", "not") and read(changed) == plain


def test_every_key_of_the_rope_dict_has_a_row_with_the_types_that_take_it() -> None:
    assert ROPE.keys() == set(RopeParameters.__annotations__)
    for key, (types, _) in ROPE.items():
        taking = [kind for kind, keys in ROPE_KEYS.items() if key in keys]
        assert types == (", ".join(taking) or ("none" if key == "mrope_section" else "all")), key


def test_every_argument_has_a_row_with_the_classes_that_take_it() -> None:
    taken = {
        name: {*inspect.signature(getattr(modeling_glm4, name).forward).parameters, *TransformersKwargs.__annotations__}
        for name in CLASSES
    }
    assert set().union(*taken.values()) - {"self", "kwargs"} <= ARGUMENTS.keys()
    for argument, (classes, fate) in ARGUMENTS.items():
        said = {"all": CLASSES, "heads": HEADS}.get(classes, tuple(re.findall(r"`(\w+)`", classes)))
        taking = tuple(name for name in CLASSES if argument in taken[name])
        assert taking == said or (not taking and ELSEWHERE in fate), argument
