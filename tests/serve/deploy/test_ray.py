"""What needs no cluster; tools/ray_check.py has one."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm4export import cli
from glm4runtime.contract import UserError
from glm4serve import Settings
from glm4serve.deploy import ray, ray_replica
from glm4serve.keys import Keys
from tests.helpers.small_bundles import fill


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "go with --ray"),
        (["--ray", "--threads", "1", "--replicas", "2", "--min-replicas", "1"], "exclude each other"),
        (["--ray", "--threads", "1", "--min-replicas", "1"], "--min-replicas and --max-replicas go together"),
        (["--ray"], "give each replica's --threads"),
        (["--ray", "--threads", "1", "--port", "0"], "--ray goes with no --certificate"),
        (["--ray", "--threads", "1", "--slots-page"], "--slots-page"),
        (["--ray", "--threads", "1", "--device-id", "1"], "--ray goes with no --device-id"),
        (["--ray", "--threads", "1"], "Ray Serve is not installed"),
        (["--ray", "--threads", "1"], "pip install '.[ray]'"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it weren't installed
    fill(tmp_path / "bundle")
    assert cli.main(["serve", str(tmp_path / "bundle"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("least", "most"), [(0, 1), (2, 1), (-1, -1), (0, 0)])
def test_how_many(least: int, most: int) -> None:
    with pytest.raises(UserError, match=f"1 <= least <= most, found {least} and {most}"):
        ray.Scale(least, most)


def test_what_replicas_are_told_travels() -> None:
    """To other processes and machines, and without the keys themselves."""
    key = "k-0123456789abcdef"
    served = ray.Served({"m": Path("/b")}, {"slots": 2}, Settings(keys=Keys({key: "ann"})))
    sent = pickle.dumps(served)
    assert key.encode() not in sent
    arrived = pickle.loads(sent)
    assert arrived.bundles == served.bundles and arrived.engine == served.engine
    assert arrived.settings.keys.owner(key) == "ann"


def test_replicas_open_encoders_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --threads and --gpu-mem-limit say holds for them too; they have no slots."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(ray_replica, "read_manifest", lambda folder: SimpleNamespace(kv_cache=None))
    monkeypatch.setattr(ray_replica, "load_encoder", lambda folder, **settings: told.update(settings))
    engine = {"slots": 8, "threads": 2, "device_id": 0, "gpu_mem_limit": 4.0, "cuda_graphs": False}
    ray.Served({"m": Path("/b")}, engine, Settings()).open()
    assert told == {"threads": 2, "device_id": 0, "gpu_mem_limit": 4.0}
