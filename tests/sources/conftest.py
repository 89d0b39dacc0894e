"""Checkpoints that the tests of this room read, or damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.random_model(), tmp_path_factory.mktemp("checkpoint") / "single")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "sharded"
    return checkpoints.save(checkpoints.random_model(), folder, max_shard_size="100KB")


@pytest.fixture
def mine(single: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(single, tmp_path / "mine"))


@pytest.fixture
def my_shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))
