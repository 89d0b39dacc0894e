"""The tokens that end, pad and begin a text: of generation_config.json, else of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm4export.sources.config_json import ConfigError, read_token_ids


def write_tokens(folder: Path, config: dict[str, Any], generation: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 96, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 1}, {"eos_token_id": [1, 2, 3], "pad_token_id": 1}, ((1, 2, 3), 1, None)),
        ({"eos_token_id": [4, 5], "pad_token_id": 0}, None, ((4, 5), 0, None)),
        ({"eos_token_id": [4, 5]}, {"eos_token_id": None, "bos_token_id": 7}, ((4, 5), None, 7)),
        ({}, {"eos_token_id": 95}, ((95,), None, None)),
        ({"eos_token_id": 0, "bos_token_id": 9}, {}, ((0,), None, 9)),
    ],
)
def test_token_ids(config: dict[str, Any], generation: Any, expected: tuple[Any, ...], tmp_path: Path) -> None:
    tokens = read_token_ids(write_tokens(tmp_path, config, generation))
    assert (tokens.eos, tokens.pad, tokens.bos) == expected


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({}, None, r"eos_token_id=None is not a token id below vocab_size=96"),
        ({"eos_token_id": []}, None, r"eos_token_id=\[\] is not a token id"),
        ({"eos_token_id": 96}, None, r"eos_token_id=96 is not a token id below vocab_size=96"),
        ({"eos_token_id": 1}, {"eos_token_id": [1, -1]}, r"eos_token_id=-1 is not a token id"),
        ({"eos_token_id": ["1"]}, None, r"eos_token_id='1' is not a token id"),
        ({"eos_token_id": True}, None, r"eos_token_id=True is not a token id"),
        ({"eos_token_id": 1, "pad_token_id": 151329}, None, r"pad_token_id=151329 is not a token id"),
        ({"eos_token_id": 1, "bos_token_id": "x"}, None, r"bos_token_id='x' is not a token id"),
        ({"eos_token_id": 1, "vocab_size": "96"}, None, r"config.json: vocab_size='96' must be a int"),
        ({"eos_token_id": 1}, [1], r"generation_config.json: expected a JSON object, found list"),
    ],
)
def test_token_ids_refused(config: dict[str, Any], generation: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_token_ids(write_tokens(tmp_path, config, generation))
