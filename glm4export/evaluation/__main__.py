"""``python -m glm4export.evaluation``: lm-evaluation-harness's command line, with bundles as a model it knows."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import glm4export.evaluation.harness  # noqa: F401 registers the model

if __name__ == "__main__":
    cli_evaluate()
