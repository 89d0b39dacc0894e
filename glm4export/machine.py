"""What this machine can do: memory, cores, CPU features, and the measured limits that inference runs into."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from glm4runtime.backends import memory

# What inference kernels are chosen by, as /proc/cpuinfo spells it.
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Machine:
    """The CPU side of a machine; sizes in bytes."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    last_level_cache: int | None  # None where the system doesn't tell
    memory: int
    memory_available: int
    huge_pages: str | None  # :func:`huge_pages`


def describe() -> Machine:
    """This machine, without measuring anything."""
    total, available = memory.memory_bytes()
    return Machine(cpu_name(), cpu_features(), cores(), last_level_cache(), total, available, huge_pages())


def cores() -> int:
    """Cores that this process may use: its affinity, and its cgroup's quota rounded up."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in memory.cgroup_folders("cpu"):
        quota, period = memory.number_in(folder / "cpu.cfs_quota_us"), memory.number_in(folder / "cpu.cfs_period_us")
        words = memory.text_of(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quota, period = int(words[0]), int(words[1])
        if quota is not None and period and quota > 0:
            count = min(count, quota / period)
    return max(1, math.ceil(count))


def cpu_name() -> str:
    """The processor's name, or its architecture where the system doesn't tell."""
    return _cpuinfo().get("model name") or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Those of :data:`FEATURES` that the processor has; what prepacked weights and kernel speeds depend on."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(feature for feature in FEATURES if feature in flags)


def last_level_cache() -> int | None:
    """Bytes of the first core's largest cache; None where the system doesn't tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = (memory.text_of(path).strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=None)


@dataclass(frozen=True)
class ProcessMemory:
    """What this process has of the memory, in bytes."""

    peak_rss_bytes: int
    pss_bytes: int  # pages that processes share count in part
    anonymous_bytes: int  # that no file is behind: repacked weights, cache, activations
    huge_page_bytes: int  # of those, in huge pages


def process_memory() -> ProcessMemory:
    """This process's memory, as it is now."""
    fields: dict[str, str] = {}
    for name in ("status", "smaps_rollup"):
        fields |= dict(
            line.split(":", 1) for line in memory.text_of(memory.PROC / "self" / name).splitlines() if ":" in line
        )
    kilobytes = (fields.get(name, "0 kB").split()[0] for name in ("VmHWM", "Pss", "Anonymous", "AnonHugePages"))
    return ProcessMemory(*(1024 * int(value) for value in kilobytes))


def huge_pages() -> str | None:
    """When the kernel gives out transparent huge pages: ``always``, ``madvise`` (to who asks), ``never``, or None."""
    words = memory.text_of(Path("/sys/kernel/mm/transparent_hugepage/enabled")).split()
    return next((word[1:-1] for word in words if word.startswith("[")), None)


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    block = memory.text_of(memory.PROC / "cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
