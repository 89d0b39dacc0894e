"""lm-evaluation-harness asks ``/v1/completions``: its own Hugging Face model over the checkpoint is the reference."""

from __future__ import annotations

from typing import Any

import pytest

from glm4runtime import Session
from tests.helpers.demo import DEMO
from tests.helpers.harness import TASKS, evaluated, require_alike
from tests.helpers.served import KEY


@pytest.fixture(scope="module")
def results(
    url: str, demo_sessions: dict[str, Session], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The service's, asked four at once, and the reference's."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    prefix = demo_sessions["fp32"].manifest.tokens.eos[0]
    asked = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="demo",
        tokenizer=str(DEMO),
        header={"Authorization": f"Bearer {KEY}"},
        custom_prefix_token_id=prefix,
        num_concurrent=4,
        max_length=512,
    )
    own = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", prefix_token_id=prefix)
    found, expected = (evaluated(model, tmp_path_factory.mktemp("tasks")) for model in (asked, own))
    return found, expected


@pytest.mark.parametrize("task", TASKS)
def test_figures_and_answers_are_those_of_the_harness_s_own_model(
    results: tuple[dict[str, Any], dict[str, Any]], task: str
) -> None:
    require_alike(*results, task)
