"""The log: one JSON object a line on standard error. It never holds a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("glm4serve")


class JsonLines(logging.Formatter):
    """Records as JSON. Of an exception the places are told and not the message, which may quote a text."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line.update(_places(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: int = logging.INFO) -> None:
    """Write our log and uvicorn's to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("glm4serve", "opentelemetry", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = ([handler] if name != "uvicorn.error" else []), name == "uvicorn.error"
        logger.setLevel(level if name == "glm4serve" else logging.WARNING)


def request(**fields: Any) -> None:
    """A request that was answered, or whose client has gone (499)."""
    _LOG.info("request", extra={"fields": fields})


def failure(id: str, error: BaseException) -> None:
    """A fault of ours, and where it was."""
    _LOG.error("failure", extra={"fields": {"id": id, **_places(error)}})


def event(name: str, **fields: Any) -> None:
    """Anything else: started, draining, ended."""
    _LOG.info(name, extra={"fields": fields})


def _places(error: BaseException) -> dict[str, Any]:
    while error.__cause__ is not None:  # an engine's thread raises elsewhere than its request's reader
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": type(error).__name__, "places": places}
