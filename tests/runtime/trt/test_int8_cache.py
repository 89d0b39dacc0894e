"""A session on an engine whose cache is int8, as the plugin has it, against the stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glm4runtime import Session, load
from glm4runtime.contract import past_name
from tests.helpers.walk import check_walk
from tests.runtime.trt.conftest import Rig


@pytest.fixture
def bundle(int8_cache_plugin: Path) -> Path:
    """What ``engine`` copies here."""
    return int8_cache_plugin


@pytest.fixture(scope="module")
def own_reference(int8_cache_plugin: Path) -> Session:
    return load(int8_cache_plugin, provider="cpu", threads=1)


def test_any_order_of_calls(engine: Callable[..., Path], rig: Callable[..., Rig], own_reference: Session) -> None:
    cuda, _ = rig()
    session = load(engine(attention="plugin"), prefill_chunk=5)
    cache = session.manifest.cache
    address = cuda.living()[0]._addresses[past_name(0, "key")]
    assert cuda.memory["device"][address] == cache.kv_heads * cache.max_seq_len * cache.head_dim  # a byte each
    assert check_walk(session.runner, own_reference.runner, np.random.default_rng(0), 25)
