from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glm4runtime import Engine

LoadEngine = Callable[..., Engine]


@pytest.fixture
def load_engine(demo_bundles: dict[str, Path]) -> Iterator[LoadEngine]:
    """Open the embedded model's bundle of a precision, or another bundle; closed at the test's end."""
    opened: list[Engine] = []

    def load(bundle: Path | str = "fp32", **settings: Any) -> Engine:
        folder = demo_bundles[bundle] if isinstance(bundle, str) else bundle
        opened.append(Engine.load(folder, **{"slots": 4, "max_seq_len": 256, "prefill_chunk": 32, **settings}))
        return opened[-1]

    yield load
    for engine in opened:
        engine.close()
