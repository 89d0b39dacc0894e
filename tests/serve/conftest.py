from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from glm4serve import Settings, create_app
from tests.helpers.fake_engine import FakeEngine

Serve = Callable[..., tuple[Any, FakeEngine]]


@pytest.fixture
def serve() -> Serve:
    """An application over a fake engine called ``m``, and that engine; options are the engine's, and ``settings``."""

    def start(script: Any = (), settings: Settings | None = None, **options: Any) -> tuple[Any, FakeEngine]:
        engine = FakeEngine(script, **options)
        return create_app({"m": engine}, settings), engine  # type: ignore[dict-item]

    return start
