"""Starting CUDA in ONNX Runtime: what is missing comes in one line; options of a GPU where they belong."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from glm4runtime import UserError, load
from glm4runtime.backends import ort_cuda, ort_session
from glm4runtime.backends.cache import Cache
from glm4runtime.backends.gpu_options import GpuOptions, gpu_options
from glm4runtime.backends.ort_session import open_session, require_provider
from glm4runtime.backends.providers import default_chunk
from glm4runtime.contract import CacheSpec, past_name, present_name, read_manifest


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """onnxruntime-gpu as it looks to us: what it prints, whether there's a GPU, what an allocation raises."""
    state: dict[str, Any] = {"prints": "", "gpu": "8.9", "raises": None, "asked": []}

    def allocate(shape: Any, dtype: Any, device: str, device_id: int) -> None:
        state["asked"].append((device, device_id))
        if state["raises"] is not None:
            raise state["raises"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: [*ort_session.NAMES.values()])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print(state["prints"]))
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", allocate)
    monkeypatch.setattr(ort_cuda, "gpu_capability", lambda: state["gpu"])
    ort_cuda._load_libraries.cache_clear()
    yield state
    ort_cuda._load_libraries.cache_clear()


def refused(provider: str = "cuda", device_id: int = 0) -> str:
    with pytest.raises(UserError) as error:
        require_provider(provider, device_id)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_library(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What onnxruntime-gpu 1.31.1 prints where CUDA's libraries are not installed."""
    machine["prints"] = (
        "Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file: No such file or directory"
        "\nFailed to load libcurand.so.10: libcurand.so.10: cannot open shared object file: No such file or directory"
        "\nPlease follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA."
    )
    assert refused() == (
        "CUDAExecutionProvider could not start: libcublasLt.so.13: cannot open shared object file: No such file or "
        "directory; pip install '.[gpu]' in a clone of glm4export's repository"
    )
    assert machine["asked"] == [] and capsys.readouterr() == ("", "")


def test_no_gpu_and_a_device_that_refuses(machine: dict[str, Any]) -> None:
    machine["gpu"] = None
    assert "no NVIDIA GPU, or no driver (libcuda.so.1), was found" in refused()
    machine |= {"gpu": "8.9", "raises": RuntimeError("CUDA failure 101: invalid device ordinal ; GPU=7\nmore")}
    assert refused(device_id=7).endswith(
        "could not start on device 7: CUDA failure 101: invalid device ordinal ; GPU=7"
    )
    machine["raises"] = None
    require_provider("cuda", 1)
    assert machine["asked"] == [("cuda", 7), ("cuda", 1)]


def test_the_provider_tensorrt_needs_release_10(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def library(name: str) -> None:
        if "libnvinfer" in name:
            raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", library)
    message = refused("tensorrt")
    assert (
        "it needs libnvinfer.so.10, of TensorRT 10; here is" in message and "pip install '.[gpu-tensorrt]'" in message
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    require_provider("tensorrt")


@pytest.mark.parametrize(
    ("device_id", "limit", "provider", "message"),
    [
        (-1, None, "cuda", "device_id=-1 is not a whole number from 0 on"),
        (True, None, "cuda", "device_id=True is not a whole number"),
        ("1", None, "cuda", "device_id='1' is not a whole number"),
        (1, None, "cpu", "device_id=1 is for cuda and tensorrt, this session runs on cpu; leave it out"),
        (1, None, "engine", "this session runs on engine; set CUDA_VISIBLE_DEVICES=1 in the environment"),
        (0, 0, "cuda", "gpu_mem_limit=0 is not a number of GB above 0"),
        (0, float("nan"), "cuda", "gpu_mem_limit=nan is not a number of GB above 0"),
        (0, True, "cuda", "gpu_mem_limit=True is not a number"),
        (0, 8, "cpu", "gpu_mem_limit is for cuda, this session runs on cpu; leave it out"),
    ],
)
def test_options_that_do_not_fit(device_id: Any, limit: Any, provider: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        gpu_options(device_id, limit, provider)
    assert message in str(error.value)


def test_options_as_onnxruntime_has_them(demo_bundles: dict[str, Path]) -> None:
    assert gpu_options(0, None, "cpu") == GpuOptions()
    options = gpu_options(1, 2.5, "cuda").cuda(500_000_000, sessions=2)
    assert options == {
        "device_id": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "1000000000",
    }
    with pytest.raises(UserError, match=r"gpu_mem_limit=0.5 GB: the cache alone takes 0.60 GB; give more, or open"):
        GpuOptions(0, 0.5).cuda(600_000_000)
    with pytest.raises(UserError, match="gpu_mem_limit is for cuda, this session runs on cpu"):
        load(demo_bundles["fp32"], gpu_mem_limit=4)


def test_too_little_memory_is_not_a_damaged_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("bfc_arena.cc:359 Failed to allocate memory for requested buffer of size 1241513984\nmore")

    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(UserError, match=r"not enough memory on the device: .*3984; free some, raise") as e:
        open_session(tmp_path / "graph.onnx", "cuda", 0)
    assert type(e.value) is UserError


def test_the_cache_is_one_allocation() -> None:
    spec = CacheSpec(layers=3, kv_heads=2, head_dim=16, dtype="float16", max_seq_len=5)
    bound: dict[str, int] = {}

    class Binding:
        def bind_input(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
            assert (device, device_id, dtype, tuple(shape)) == ("cpu", 0, np.float16, (1, 2, 5, 16))
            bound[name] = address

        bind_output = bind_input

    cache = Cache(spec, 5, "cpu")
    cache.bind(Binding())
    size, first = 2 * 5 * 16 * 2, bound[past_name(0, "key")]
    names = [(layer, part) for layer in range(3) for part in ("key", "value")]
    assert [bound[past_name(*name)] for name in names] == [first + index * size for index in range(6)]
    assert all(bound[past_name(*name)] == bound[present_name(*name)] for name in names)
    cache._buffers[1, "value"].array[:] = 3
    assert [np.frombuffer(bits, np.float16).max() for bits in cache.bits(5)] == [0, 0, 0, 3, 0, 0]
    cache.clear()
    assert not any(any(bits) for bits in cache.bits(5))


def test_longer_chunks_where_matrices_are_widened(demo_bundles: dict[str, Path]) -> None:
    manifest = read_manifest(demo_bundles["fp16"])
    assert default_chunk(manifest, "cuda") == 512
    object.__setattr__(manifest, "precision", "int4")
    assert (default_chunk(manifest, "cuda"), default_chunk(manifest, "cpu")) == (2048, 512)
