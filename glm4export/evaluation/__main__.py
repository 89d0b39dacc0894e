"""``python -m glm4export.evaluation``: lm-evaluation-harness's command line, with bundles as a model it knows."""

from __future__ import annotations

import sys

from glm4export.terminal.errors import message_text
from glm4runtime.contract import UserError, installing

if __name__ == "__main__":
    try:
        from lm_eval.__main__ import cli_evaluate

        import glm4export.evaluation.harness  # noqa: F401 registers the model
    except ModuleNotFoundError as error:
        print(f"glm4export: error: {error.name} is not installed; {installing('harness')}", file=sys.stderr)
        sys.exit(2)
    try:
        cli_evaluate()
    except UserError as error:
        print(f"glm4export: error: {message_text(str(error))}", file=sys.stderr)
        sys.exit(2)
