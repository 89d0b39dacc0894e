"""The machine: its memory, cores and CPU, measured limits, and the speeds of prefill's kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from glm4export import cli, machine
from glm4export.bench import kernels
from glm4export.bench import limits as bench_limits
from glm4export.bench.kernels import KernelSpeeds
from glm4runtime.backends import memory
from glm4runtime.backends.matmul_model import int4_model, matmul_model
from glm4runtime.contract.onnxfile import read_graph
from tests.helpers import checkpoints
from tests.helpers.encoders import random_encoder


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limits, "_SECONDS", 0.0)
    monkeypatch.setattr(bench_limits, "_ARRAY_BYTES", 1 << 24)
    monkeypatch.setattr(bench_limits, "_MATMUL", (64, 256, 256))
    measured = bench_limits.measure_limits()
    assert min(measured.read_bytes_per_second, measured.int8_ops_per_second, measured.fp32_ops_per_second) > 1e6
    assert measured.ops_per_second("int8") == measured.int8_ops_per_second


def test_this_machine() -> None:
    found = machine.describe()
    assert 0 < found.memory_available <= found.memory and found.cores >= 1 and found.cpu
    assert set(found.features) <= set(machine.FEATURES)


MEMINFO = "MemTotal:  8000 kB\nMemFree:  1000 kB\nMemAvailable:  6000 kB\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write files of a made-up /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(**files: str) -> None:
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8000, 6000),
        ({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "1\n"}, 8000, 6000),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": "max\n", "cgroup/a/memory.max": "4096000\n",
          "cgroup/a/memory.current": "3072000\n", "cgroup/a/memory.stat": "anon 1\ninactive_file 1024000\n"},
         4000, 2000),
        ({"proc/self/cgroup": "0::/of/the/host\n", "cgroup/memory.max": "2048000\n",
          "cgroup/memory.current": "9999999\n"}, 2000, 0),
        ({"proc/self/cgroup": "4:cpu,memory:/x\n1:pids:/\n", "cgroup/memory/x/memory.limit_in_bytes": "1024000\n",
          "cgroup/memory/x/memory.usage_in_bytes": "512000\n",
          "cgroup/memory/x/memory.stat": "total_inactive_file 102400\n"}, 1000, 600),
        ({"proc/self/cgroup": "4:memory:/\n", "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
         8000, 6000),
    ],
)  # fmt: skip
def test_memory(files: dict[str, str], total: int, available: int, system: Callable[..., None]) -> None:
    system(**files)
    assert memory.memory_bytes() == (total * 1024, available * 1024)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "2:cpu,cpuacct:/\n", "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
          "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 1),
        ({"proc/self/cgroup": "2:cpu:/\n", "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)  # fmt: skip
def test_cores(files: dict[str, str], cores: int, system: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    system(**files)
    assert machine.cores() == cores


def test_cpu(system: Callable[..., None]) -> None:
    first = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n"
    system(**{"proc/cpuinfo": f"{first}\nprocessor\t: 1\nflags\t\t: fma\n"})
    assert (machine.cpu_name(), machine.cpu_features()) == ("Some CPU", ("avx2", "avx512_vnni"))
    system(**{"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n"})
    assert machine.cpu_features() == ("asimd", "asimddp")
    assert machine.cpu_name()


def test_kernel_speeds_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = {"int4": 3e11, "int8": 7e11}
    monkeypatch.setattr(kernels, "matmul_peak", measured.pop)
    assert kernels.kernel_speeds() == kernels.kernel_speeds() == KernelSpeeds(3e11, 7e11)
    (kept,) = tmp_path.rglob("*.json")
    assert KernelSpeeds(3e11, 7e11).rows_are_faster and not KernelSpeeds(3e11, 3.5e11).rows_are_faster
    for damage in ("", "[]", '{"int4": "x", "int8": 1}', '{"int4": 1}', '{"int4": 0, "int8": 1}'):
        kept.write_text(damage)
        measured |= {"int4": 1e11, "int8": 2e11}
        assert kernels.kernel_speeds() == KernelSpeeds(1e11, 2e11)
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("in the way")
    measured |= {"int4": 1e11, "int8": 2e11}
    assert kernels.kernel_speeds() == KernelSpeeds(1e11, 2e11)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    measured |= {"int4": 1e11, "int8": 2e11}
    assert kernels.kernel_speeds() == KernelSpeeds(1e11, 2e11)


def test_the_int4_kernel_multiplies() -> None:
    """Against numpy: 2 and -3 as 4-bit values around 8, in blocks of 32 with scales of their own."""
    packed = np.full((5, 2, 16), 0xAA, np.uint8)
    packed[:, 1] = 0x55
    scales = np.arange(1, 11, dtype=np.float32)
    model = int4_model(packed, scales)
    (found,) = ort.InferenceSession(model).run(None, {"A": np.ones((3, 64), np.float32)})
    wanted = 32 * (2 * scales[0::2] - 3 * scales[1::2])
    np.testing.assert_allclose(found, np.broadcast_to(wanted, (3, 5)), rtol=1e-3)
    onnx.checker.check_model(onnx.load_from_string(matmul_model(np.ones((4, 4), np.float32))))


@pytest.mark.parametrize(
    ("speeds", "argv", "prefill", "told"),
    [
        ((3e11, 7e11), ["--precision", "int4"], "int8", "auto: int8, 700 GOP/s against 300 of weights in blocks"),
        ((3e11, 3e11), ["--precision", "int4"], "int4", "since int8 has 300 GOP/s against 300 of weights in blocks"),
        ((3e11, 7e11), ["--precision", "fp32"], "fp32", "which has no others for prefill"),
    ],
)
def test_prefill_precision_auto(
    speeds: tuple[float, float],
    argv: list[str],
    prefill: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernels, "kernel_speeds", lambda: KernelSpeeds(*speeds))
    folder = checkpoints.save(checkpoints.random_model(), tmp_path / "checkpoint")
    out = tmp_path / "bundle"
    build = ["build", str(folder), "-o", str(out), "--target", "cpu", "--prefill-precision", "auto", *argv]
    assert cli.main(build) == 0
    assert told in capsys.readouterr().err
    operators = {node.op for node in read_graph(out / "prefill.onnx").nodes}
    assert ("MatMulIntegerToFloat" in operators) == (prefill == "int8")


def test_prefill_precision_auto_where_onnxruntime_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")  # the last for Python 3.10
    folder = checkpoints.save(checkpoints.random_model(), tmp_path / "checkpoint")
    build = ["build", str(folder), "-o", str(tmp_path / "bundle"), "--target", "cpu", "--precision", "int4"]
    assert cli.main([*build, "--prefill-precision", "auto"]) == 0
    assert "auto: the precision's own weights, since onnxruntime 1.23.2 has no kernels" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--task", "features"], []], ids=["by option", "by class"])
def test_prefill_precision_auto_where_there_is_no_prefill(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On every machine: nothing is measured, and nothing refused where int8 would have been faster."""
    monkeypatch.setattr(kernels, "kernel_speeds", lambda: KernelSpeeds(3e11, 7e11))
    model = checkpoints.random_model() if argv else random_encoder("features")
    folder = checkpoints.save(model, tmp_path / "checkpoint")
    build = ["build", str(folder), "-o", str(tmp_path / "bundle"), "--target", "cpu", "--precision", "int4"]
    assert cli.main([*build, "--prefill-precision", "auto", *argv]) == 0
    assert "--prefill-precision auto: none, since features has no prefill" in capsys.readouterr().err
