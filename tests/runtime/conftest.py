from __future__ import annotations

import pytest

from tests.helpers.adapters import AdaptedModel


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return AdaptedModel(tmp_path_factory.mktemp("adapters"))
