from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glm4serve import Settings, create_app
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.served import served

Serve = Callable[..., tuple[Any, FakeEngine]]


@pytest.fixture(scope="package")
def url(demo_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``glm4export serve`` on the embedded model in fp32, for real clients."""
    with served(demo_bundles["fp32"], tmp_path_factory.mktemp("serve")) as address:
        yield address


@pytest.fixture
def serve() -> Serve:
    """An application over a fake engine called ``m``, and that engine; options are the engine's, and ``settings``."""

    def start(script: Any = (), settings: Settings | None = None, **options: Any) -> tuple[Any, FakeEngine]:
        engine = FakeEngine(script, **options)
        return create_app({"m": engine}, settings), engine  # type: ignore[dict-item]

    return start
