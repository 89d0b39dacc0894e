"""Shared by tests: config_of."""

from __future__ import annotations

from typing import Any

import transformers

from tests.helpers import checkpoints


def config_of(**overrides: Any) -> dict[str, Any]:
    """What transformers 5 writes into config.json; a value of None drops the key."""
    data = transformers.Glm4Config(**{**checkpoints.SMALL, **overrides}).to_dict()
    return {**data, "architectures": ["Glm4ForCausalLM"]}
