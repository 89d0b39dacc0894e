"""Where layers are cut into stages, and which builds have none."""

from __future__ import annotations

from typing import Any

import pytest

from glm4export.build.options import BuildOptions
from glm4export.passes.cut_stages import split
from glm4runtime import UserError


@pytest.mark.parametrize(
    ("costs", "parts", "lengths"),
    [
        ([3, 1, 1, 1, 1, 1], 2, (2, 4)),
        ([3, 1, 1, 1, 1, 3], 2, (3, 3)),
        ([1, 1, 1, 1, 9], 3, (2, 2, 1)),
        ([1, 1, 1, 1, 1], 4, (1, 1, 1, 2)),
        ([7, 1, 1], 3, (1, 1, 1)),
    ],
)
def test_the_largest_stage_is_as_small_as_can_be(costs: list[int], parts: int, lengths: tuple[int, ...]) -> None:
    assert split(costs, parts) == lengths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 1}, "--stages 1: expected at least 2; leave it out for one graph with all layers"),
        (
            {"target": "tensorrt"},
            "--stages does not go with --target tensorrt, whose engines are made of one graph; build",
        ),
        (
            {"inputs": "embeds"},
            "--stages does not go with --inputs embeds, which is for programs that run a graph them",
        ),
        ({"output_hidden_states": True}, "--stages does not go with --output-hidden-states, which is for programs"),
        ({"output_attentions": True}, "--stages does not go with --output-attentions, which is for programs"),
        ({"position_ids": True}, "--stages does not go with --position-ids, which is for programs"),
        (
            {"output_top_logits": 8},
            "--stages does not go with --output-top-logits, which no stage gives yet; leave one of",
        ),
        ({"lora_slots": 2}, "--stages does not go with --lora-slots, whose adapters lie on one device; merge one with"),
    ],
)
def test_options_that_do_not_go_with_stages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        BuildOptions(**{"precision": "fp16", "stages": 2, **options})
    assert message in str(error.value)


def test_models_that_have_no_stages() -> None:
    options = BuildOptions(stages=5)
    with pytest.raises(UserError, match="--stages 5: the model has 4 layers; ask for as many stages at most"):
        options.require_fit("causal-lm", 4)
    with pytest.raises(UserError, match="--stages goes with --task causal-lm, not with features; build without it"):
        options.require_fit("features", 40)
