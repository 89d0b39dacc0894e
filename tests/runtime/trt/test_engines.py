"""Which engine of a bundle is taken, and what makes one unfit; host code, weight streaming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import BundleError, Session, UserError, load
from glm4runtime.contract import FileSpec, read_manifest
from glm4runtime.contract.engine_spec import Profile
from tests.helpers import fake_tensorrt
from tests.helpers.walk import check_walk
from tests.runtime.trt.conftest import Rig


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.6"}, "the version of TensorRT does not fit: the engine was built for 1.6, here is 1.7.1"),
        ({"compute_capability": "12.0"}, "the compute capability does not fit: the engine was built for 12.0, here is"),
        ({"graph_sha256": "0" * 64}, "the bundle's graph by its sha256 does not fit"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_fit(
    changes: dict[str, Any], reason: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig()
    folder = engine(**changes)
    with pytest.raises(UserError, match=r"no engine that runs here: .*--provider cpu") as caught:
        load(folder)
    assert reason in str(caught.value)


def test_the_first_engine_that_fits_is_taken(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    engine(compute_capability="12.0")
    folder = engine(compute_capability="8.9")
    assert load(folder).runner.prefill_chunk == 32
    assert len(list((folder / "engines").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "tensorrt-rtx-sm89.engine: missing; {} lists it"),
        (lambda path: path.write_text("x"), "tensorrt-rtx-sm89.engine: 1 bytes, {} says"),
        (lambda path: path.write_text("x" * path.stat().st_size), "sha256 .*, {} says .*; the file was"),
    ],
)  # fmt: skip
def test_a_damaged_engine(
    damage: Callable[[Path], Any], message: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig()
    folder = engine()
    damage(folder / "engines" / "tensorrt-rtx-sm89.engine")
    with pytest.raises(BundleError, match=message.format("the manifest")):
        load(folder, check_hashes=True)
    folder = engine(listed=False)
    damage(folder / "engines" / "tensorrt-rtx-sm89.engine")
    with pytest.raises(
        BundleError,
        match=message.format("its sidecar") if "sha256" not in message else "deserialize_cuda_engine failed",
    ):
        load(folder)


@pytest.mark.parametrize("changes", [{"version_compatible": False}, {"version_compatible": True}])
def test_hashes_count_of_listed_engines_only(
    changes: dict[str, Any], engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    rig()
    folder = engine(listed=False, **changes)
    with pytest.raises(
        BundleError, match=r"tensorrt-rtx-sm89\.json: the manifest doesn't list it; build the engine again"
    ):
        load(folder, check_hashes=True)


@pytest.mark.parametrize("damage", ["engine", "json"])
def test_host_code_runs_where_it_is_what_was_built(
    damage: str, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    """A version-compatible engine is loaded with ``engine_host_code_allowed``, its hashes compared unasked."""
    _, module = rig()
    module.host_code = True
    folder = engine(version_compatible=True, version="1.5.9")
    session = load(folder)
    assert module.runtime.engine_host_code_allowed is True and len(session.runner.prefill([5])) == 31
    path = folder / "engines" / f"tensorrt-rtx-sm89.{damage}"
    text = path.read_text()
    path.write_text(text.replace("1.5.9", "1.5.8") if damage == "json" else "x" * len(text))
    with pytest.raises(BundleError, match=rf"tensorrt-rtx-sm89\.{damage}: sha256 .* says .*; the file was changed"):
        load(folder)


def test_other_engines_may_hold_no_host_code(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    _, module = rig()
    module.host_code = True
    with pytest.raises(
        BundleError, match="deserialize_cuda_engine failed: engine_host_code_allowed is False; build the"
    ):
        load(engine())


def test_a_sidecar_that_is_not_the_manifests(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    folder = engine(version_compatible=True)
    manifest, name = read_manifest(folder), "engines/tensorrt-rtx-sm89.engine"
    files = {**manifest.files, name: FileSpec(manifest.files[name].size, "0" * 64)}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(
        BundleError, match=r"tensorrt-rtx-sm89\.json: the manifest has another engine; build the engine"
    ):
        load(folder)


def test_a_streaming_engine_gets_a_budget(
    engine: Callable[..., Path], rig: Callable[..., Rig], reference: Session
) -> None:
    """Of what the device has left beside the cache, before the first context and before scratch memory is measured."""
    cuda, module = rig()
    module.streams = True
    runner = load(engine(weight_streaming=True)).runner
    names = cuda.names()
    budget = cuda.calls[names.index("weight_streaming_budget_v2")][1]
    assert budget == module.engine.weight_streaming_budget_v2 < module.engine.streamable_weights_size
    cache = 2 * runner.manifest.cache.layers
    assert (
        names[: names.index("weight_streaming_budget_v2")].count("cudaMalloc") == cache + 1 + 2 * 2
    )  # logits, two kinds of inputs
    assert cuda.living()[0]._scratch[1] == module.engine.device_memory_size_v2 == 3000
    check_walk(runner, reference.runner, np.random.default_rng(0), 20)


def test_a_budget_that_is_refused(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    """The sidecar says that it streams, and it doesn't."""
    rig()
    with pytest.raises(UserError, match=r"weight_streaming_budget_v2=\d+ failed: the budget can't be set"):
        load(engine(weight_streaming=True))


def test_a_file_that_is_no_engine(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    path = engine() / "engines" / "tensorrt-rtx-sm89.engine"
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(BundleError, match="deserialize_cuda_engine failed: not an engine; build the engine again"):
        load(path.parent.parent)


def test_an_engine_with_other_inputs(
    monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Path], rig: Callable[..., Rig]
) -> None:
    """Its sidecar says that it is this bundle's, and it isn't."""
    rig()
    folder = engine()
    monkeypatch.setattr(
        fake_tensorrt.IExecutionContext, "set_tensor_address", lambda self, name, memory: name != "present.1.key"
    )
    with pytest.raises(BundleError, match=r"the engine has no tensor 'present\.1\.key'; build it again"):
        load(folder)


def test_a_profile_too_narrow_for_drafts(engine: Callable[..., Path], rig: Callable[..., Rig]) -> None:
    rig()
    narrow = (Profile("step", (1, 1, 1), (1, 1, 32), (1, 1, 4)),)
    with pytest.raises(BundleError, match="none of its profiles serves a run of 5 tokens of one sequence with 5 rows"):
        load(engine(narrow))
