"""The plugins in TensorRT's own front end, and their kernels compiled for a device that isn't here."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from glm4export.tensorrt.plugin import kernels
from glm4export.tensorrt.plugin.aot import append_kernel, attend_kernel, combine_kernel, keep_parameters
from glm4export.tensorrt.plugin.geometry import Geometry, split_sizes
from glm4export.tensorrt.plugin.register import Tactic, register
from glm4export.tensorrt.plugin.tiles import CAPABILITIES, DEVICE_SHARED, SHARED_LIMIT, decode_tiles, prefill_tiles
from glm4runtime.contract import UserError
from tests.helpers import fake_tensorrt_plugin
from tests.helpers.fake_tensorrt_plugin import Built, Tensor
from tools.plugin_runs import driver
from tools.plugin_runs.launch import Integers, attention
from tools.plugin_runs.reference import Case

GLM4_9B = Geometry(32, 2, 128, 64, 4096, 128**-0.5)
PROGRAMS = 264  # twice an H100's multiprocessors
ATTRIBUTES = {"num_heads": 32, "kv_num_heads": 2, "head_dim": 128, "scale": 128**-0.5, "programs": PROGRAMS}

QKV: Tensor = ("HALF", ["batch", "seq", 36 * 128])
CACHE: Tensor = ("HALF", ["batch", 2, 4096, 128])
POSITIONS: Tensor = ("INT64", ["batch", "seq"])
INDICES: Tensor = ("INT64", ["batch"])
MASK: Tensor = ("BOOL", ["batch", 1, "seq", 4096])
TABLE: Tensor = ("HALF", [4096, 32])
SCALE: Tensor = ("FLOAT", [2])


@pytest.fixture(scope="module")
def trt() -> Iterator[Any]:
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("the wheel tensorrt-cu12-bindings is not installed")
    with fake_tensorrt_plugin.tensorrt() as module:
        register(89)
        yield module


def parameters(built: Built) -> list[str]:
    entry = re.search(rf"\.entry {built.kernel_name}\((.*?)\n\)", built.ptx, re.DOTALL)
    assert entry is not None
    return re.findall(r"\.param (\.u\d+)", entry[1])


def test_append_updates_the_caches_in_place(trt: Any) -> None:
    inputs = [QKV, CACHE, CACHE, POSITIONS, INDICES, TABLE, TABLE, SCALE, SCALE]
    built = fake_tensorrt_plugin.build(trt, "glm4::AppendToCache", inputs, {})
    assert built.aliases == {0: 1, 1: 2}
    assert built.output_types == [trt.float16, trt.float16]
    assert built.shapes({"batch": 3, "seq": 5}) == [[3, 2, 4096, 128]] * 2
    assert built.launch({"batch": 3, "seq": 17}) == ((2, 2, 3), [17])
    assert parameters(built) == [".u64"] * 9 + [".u32"] + [".u64"] * 2


@pytest.mark.parametrize(
    "name,kernel,scalars",
    [("AppendToCache", "append", 1), ("FlashAttention", "attend", 3), ("CombineSplits", "combine", 3)],
)
def test_kernels_take_inputs_scalars_and_outputs_in_tensorrts_order(
    name: str, kernel: str, scalars: int, trt: Any
) -> None:
    plugin = trt.plugin._lib.QDP_REGISTRY[f"glm4::{name}"]
    arguments = [argument for argument in getattr(kernels, kernel).arg_names if not argument.isupper()]
    inputs = plugin.input_tensor_names
    assert arguments[: len(inputs)] == inputs
    assert arguments[len(inputs) :][:scalars] == ["seq", "splits", "rows"][:scalars]
    assert len(arguments) == len(inputs) + scalars + plugin.num_outputs


@pytest.mark.parametrize("tactic", Tactic)
def test_attend_in_shares_that_follow_from_the_sizes(tactic: Tactic, trt: Any) -> None:
    inputs = [QKV, CACHE, CACHE, POSITIONS, INDICES, MASK, TABLE, TABLE, SCALE, SCALE]
    built = fake_tensorrt_plugin.build(trt, "glm4::FlashAttention", inputs, ATTRIBUTES, int(tactic))
    assert sorted(built.tactics) == [Tactic.DECODE, Tactic.PREFILL]
    assert set(built.aliases.values()) == {-1}
    assert built.output_types == [trt.float16, trt.float32, trt.float32]
    rows = 16 if tactic == Tactic.DECODE else 64
    for batch, seq in ((1, 1), (3, 1), (8, 4), (1, 512), (2, 2000)):
        splits, kept = split_sizes(batch, seq, 2, 16, PROGRAMS, Integers())
        sizes = {"batch": batch, "seq": seq}
        grid = (Integers.cdiv(seq * 16, rows), splits, batch * 2)
        assert built.launch(sizes) == (grid, [seq, splits, kept])
        assert built.shapes(sizes) == [
            [batch, seq, 4096], [batch, 2, splits, kept, 128], [batch, 2, splits, kept]
        ]  # fmt: skip
    assert parameters(built) == [".u64"] * 10 + [".u32"] * 3 + [".u64"] * 3
    block = built.params.block_x.expr.evaluate({})
    assert f".reqntid {block}" in built.ptx


def test_combine_works_in_place(trt: Any) -> None:
    partial: Tensor = ("FLOAT", ["batch", 2, "splits", "rows", 128])
    lse: Tensor = ("FLOAT", ["batch", 2, "splits", "rows"])
    built = fake_tensorrt_plugin.build(trt, "glm4::CombineSplits", [("HALF", ["batch", "seq", 4096]), partial, lse], {})
    assert built.aliases == {0: 0}
    assert built.launch({"batch": 2, "seq": 1, "splits": 64, "rows": 16}) == ((16, 2, 2), [1, 64, 16])
    assert parameters(built) == [".u64"] * 3 + [".u32"] * 3 + [".u64"]


def test_bfloat16_and_int8(trt: Any) -> None:
    cache: Tensor = ("INT8", CACHE[1])
    qkv, table = ("BF16", QKV[1]), ("BF16", TABLE[1])
    inputs = [qkv, cache, cache, POSITIONS, INDICES, table, table, SCALE, SCALE]
    assert fake_tensorrt_plugin.build(trt, "glm4::AppendToCache", inputs, {}).output_types == [trt.int8, trt.int8]
    inputs = [qkv, cache, cache, POSITIONS, INDICES, MASK, table, table, SCALE, SCALE]
    assert (
        fake_tensorrt_plugin.build(trt, "glm4::FlashAttention", inputs, ATTRIBUTES, 1).output_types[0] == trt.bfloat16
    )


def test_what_the_kernels_do_not_take_is_refused_while_the_engine_is_built(trt: Any) -> None:
    single = [
        ("FLOAT", QKV[1]),
        ("FLOAT", CACHE[1]),
        ("FLOAT", CACHE[1]),
        POSITIONS,
        INDICES,
        TABLE,
        TABLE,
        SCALE,
        SCALE,
    ]
    with pytest.raises(UserError, match="activations in float32 are not supported"):
        fake_tensorrt_plugin.build(trt, "glm4::AppendToCache", single, {})


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_every_device_and_fit_it(capability: int, tmp_path: Path) -> None:
    """GLM-4-9B's, without a GPU. The PTX that TensorRT gets assembles, and is the oldest that its driver needs."""
    compiled = [
        append_kernel(GLM4_9B, capability),
        attend_kernel(GLM4_9B, capability, decode_tiles(GLM4_9B)),
        attend_kernel(GLM4_9B, capability, prefill_tiles(GLM4_9B)),
        combine_kernel(GLM4_9B, capability),
    ]
    version = {100: "8.6", 120: "8.7"}.get(capability, "8.0")
    for kernel in compiled:
        assert kernel.shared <= SHARED_LIMIT < DEVICE_SHARED[capability]
        assert f".version {version}\n" in kernel.ptx
        assert re.search(rf"\.target sm_{capability}a?\n", kernel.ptx)
        assert ".py" not in kernel.ptx  # no line information, which has this machine's paths
        source = tmp_path / "kernel.ptx"
        source.write_text(kernel.ptx)
        knobs = triton.knobs.nvidia
        assembler = knobs.ptxas_blackwell if capability >= 100 else knobs.ptxas
        target = f"sm_{capability}" + "a" * (capability >= 90)
        subprocess.run([assembler.path, f"-arch={target}", source, "-o", tmp_path / "cubin"], check=True)


def test_gpu_check_passes_arguments_as_tensorrt_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, up to the driver: pointers and 32-bit numbers in the kernels' order."""
    calls: list[tuple[Any, ...]] = []

    class Recorder(driver.Driver):
        def __init__(self) -> None:
            pass

        def __call__(self, function: str, *arguments: Any) -> None:
            if function == "cuLaunchKernel":
                sizes, (shared, _, pointers, _) = arguments[1:7], arguments[7:]
                values = [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]
                calls.append((sizes, shared, values))

    monkeypatch.setattr(driver, "Driver", Recorder)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    case = Case.random(GLM4_9B, (5, 0), 3)
    launch = driver.Compiled(GLM4_9B, 89, decode_tiles(GLM4_9B))
    attended = attention(launch, case, programs=PROGRAMS)
    (append, _, appended), (attend, shared, attending), (combine, _, combining) = calls
    splits, rows = split_sizes(2, 3, 2, 16, PROGRAMS, Integers())
    assert append == (1, 2, 2, 128, 1, 1)
    assert attend == (3, splits, 4, 128, 1, 1)
    assert combine == (rows, 2, 2, 128, 1, 1)
    assert shared == 40960
    keys, values = case.keys.data_ptr(), case.values.data_ptr()
    assert (appended[0], appended[1:3], appended[-2:]) == (case.qkv.data_ptr(), [keys, values], [keys, values])
    assert [value & 0xFFFFFFFF for value in (appended[9], *attending[10:13])] == [3, 3, splits, rows]
    assert attending[1:3] == [keys, values] and attending[13] == attended.data_ptr()
    assert combining[0] == combining[-1] == attended.data_ptr() and combining[1:3] == attending[14:]


def test_a_device_that_kernels_are_not_made_for_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"compute capability 7\.5 is not one of 8\.0, .*; build with --attention stand"
    ):
        append_kernel(GLM4_9B, 75)


def test_a_parameter_that_is_read_is_not_taken_away() -> None:
    entry = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)"
    ptx = entry + "\n{\n\tld.param.b64 %r, [f_param_1];\n}"
    assert keep_parameters(ptx, "f", 2) == ptx
    with pytest.raises(AssertionError, match=r"f reads .*f_param_1, which TensorRT does not pass"):
        keep_parameters(ptx, "f", 1)
    assert "f_param_1\n)" not in keep_parameters(ptx.replace("[f_param_1]", "[f_param_0]"), "f", 1)


def test_swapped_attributes_are_told(trt: Any) -> None:
    inputs = [QKV, CACHE, CACHE, POSITIONS, INDICES, MASK, TABLE, TABLE, SCALE, SCALE]
    swapped = ATTRIBUTES | {"num_heads": 2, "kv_num_heads": 32}
    with pytest.raises(UserError, match=r"are \(2, 32, 128\), the tensors' shapes say \(32, 2, 128\)"):
        fake_tensorrt_plugin.build(trt, "glm4::FlashAttention", inputs, swapped, tactic=Tactic.DECODE)


def test_a_cache_that_is_bound_and_not_aliased() -> None:
    """The same kernel with the same launch; TensorRT learns nothing of the address. Last: it registers anew."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("the wheel tensorrt-cu12-bindings is not installed")
    inputs = [QKV, CACHE, CACHE, POSITIONS, INDICES, TABLE, TABLE, SCALE, SCALE]
    with fake_tensorrt_plugin.tensorrt() as module:
        register(89, aliased=False)
        built = fake_tensorrt_plugin.build(module, "glm4::AppendToCache", inputs, {})
    assert built.aliases == {0: -1, 1: -1}
    assert built.shapes({"batch": 3, "seq": 5}) == [[3, 2, 4096, 128]] * 2
    assert built.launch({"batch": 3, "seq": 17}) == ((2, 2, 3), [17])
    assert parameters(built) == [".u64"] * 9 + [".u32"] + [".u64"] * 2
