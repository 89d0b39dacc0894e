"""Configs as transformers writes them, and the generated cases whose numbers are compared with its."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers

from tests.helpers import checkpoints
from tests.helpers.encoders import CLASSES, PAD
from tests.helpers.models import ROPE_TYPES, Generated, generated

TASKS = ("causal-lm", *CLASSES)
MASKS = ("none", "right", "left", "holes")  # no padding, padding on a side, a mask with holes anywhere
POSITIONS = 48  # of the built cases


def config_of(**overrides: Any) -> dict[str, Any]:
    """What transformers 5 writes into config.json; a value of None drops the key."""
    data = transformers.Glm4Config(**{**checkpoints.SMALL, **overrides}).to_dict()
    return {**data, "architectures": ["Glm4ForCausalLM"]}


@dataclass(frozen=True)
class Case:
    """A model, what is asked of it, and how its texts are padded."""

    seed: int
    task: str
    model: Generated
    mask: str  # one of MASKS; a causal model's cache takes the first two
    pooling: str | None = None
    normalize: bool = False
    num_labels: int = 3
    pad: int | None = PAD  # None takes one text at a time
    target: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.task}-{self.model.name}-{self.mask}"


def case(seed: int) -> Case:
    """One of any sizes, for the graphs as PyTorch runs them: every task meets every rope type and mask in turn."""
    model, task, turn = generated(seed), TASKS[seed // len(ROPE_TYPES) % len(TASKS)], seed // 24
    if task == "causal-lm":
        return Case(seed, task, model, MASKS[turn % 2])
    pooling = (None, "last", "mean")[turn % 3] if task == "features" else None
    pad = None if task == "sequence-classification" and seed % 5 == 0 else PAD
    return Case(seed, task, model, MASKS[turn % 4], pooling, pooling is not None and seed % 2 == 1, 1 + seed % 4, pad)


_NARROW: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
_ODD: dict[str, Any] = {
    **_NARROW,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_size": 56,
    "intermediate_size": 100,
    "hidden_act": "gelu_new",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1.5625e-07,
}
_BUILDS = (  # what differs in more than rope is another trace, which is what takes the time
    ("causal-lm", "cpu", _NARROW),
    ("causal-lm", "tensorrt", _ODD),
    ("features", "cpu", _NARROW),
    ("features", "tensorrt", _ODD),
    ("sequence-classification", "cpu", _ODD),
    ("token-classification", "cpu", _NARROW),
)


def built_cases() -> Iterator[Case]:
    """Those that are built and run in ONNX Runtime, each of :data:`POSITIONS` positions: six kinds by six ropes."""
    for kind, (task, target, sizes) in enumerate(_BUILDS):
        for index, rope_type in enumerate(ROPE_TYPES):
            seed = 1000 + 6 * kind + (index - 1000) % 6
            model = generated(seed, **sizes)
            rope = model.fields["rope_parameters"]
            assert rope["rope_type"] == rope_type
            rope["partial_rotary_factor"] = 0.5 if sizes is _NARROW else 1.0
            if rope_type in ("yarn", "llama3"):
                rope["original_max_position_embeddings"] = POSITIONS // 3
            if rope_type in ("yarn", "linear"):
                rope["factor"] = 3.7
            if rope_type == "longrope":
                rope.update({name: [1 + 0.3 * i for i in range(8)] for name in ("short_factor", "long_factor")})
                rope["original_max_position_embeddings"] = POSITIONS
            stretched = rope_type in ("yarn", "linear")
            model.fields["max_position_embeddings"] = POSITIONS // 3 if stretched else POSITIONS
            spelling = Generated(model.fields, (), model.older, POSITIONS)
            mask = MASKS[index % 2 if task == "causal-lm" else index % 4]
            yield Case(seed, task, spelling, mask, target=target)
