"""A session on an engine whose cache is int8, as the plugin has it, against the stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glm4runtime import Session, load
from glm4runtime.contract import past_name
from tests.conftest import Build
from tests.helpers.heldout import HELDOUT
from tests.helpers.walk import check_walk
from tests.runtime.trt.conftest import Rig


@pytest.fixture(scope="session")
def bundle(build_bundle: Build) -> Path:
    """In the place of the other tests': the embedded model, the only one with a tokenizer to calibrate with."""
    options = {"precision": "fp16", "attention": "plugin", "kv_cache": "int8", "calibrate": HELDOUT}
    return build_bundle(None, target="tensorrt", max_seq_len=64, **options)


@pytest.fixture(scope="module")
def own_reference(bundle: Path) -> Session:
    return load(bundle, provider="cpu", threads=1)


def test_any_order_of_calls(engine: Callable[..., Path], rig: Callable[..., Rig], own_reference: Session) -> None:
    cuda, _ = rig()
    session = load(engine(attention="plugin"), prefill_chunk=5)
    cache = session.manifest.cache
    address = cuda.living()[0]._addresses[past_name(0, "key")]
    assert cuda.memory["device"][address] == cache.kv_heads * cache.max_seq_len * cache.head_dim  # a byte each
    assert check_walk(session.runner, own_reference.runner, np.random.default_rng(0), 25)
