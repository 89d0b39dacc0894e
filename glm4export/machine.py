"""What this machine can do: memory, cores, CPU features, and the measured limits that inference runs into."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What inference kernels are chosen by, as /proc/cpuinfo spells it.
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


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
    total, available = memory_bytes()
    return Machine(cpu_name(), cpu_features(), cores(), last_level_cache(), total, available, huge_pages())


def memory_bytes() -> tuple[int, int]:
    """Total and available memory in bytes, as far as this process's cgroup lets it have them."""
    lines = (line.split() for line in _text(_PROC / "meminfo").splitlines())
    fields = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    total, available = fields["MemTotal"], fields["MemAvailable"]
    for folder in _cgroup_folders("memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= fields["MemTotal"]:  # no limit: `max`, or a number near 2**63
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        total = min(total, limit)
        available = min(available, limit - max(0, used - _reclaimable(folder)))
    return total, max(0, available)


def cores() -> int:
    """Cores that this process may use: its affinity, and its cgroup's quota rounded up."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _cgroup_folders("cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        words = _text(folder / "cpu.max").split()
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
    texts = (_text(path).strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
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
        fields |= dict(line.split(":", 1) for line in _text(_PROC / "self" / name).splitlines() if ":" in line)
    kilobytes = (fields.get(name, "0 kB").split()[0] for name in ("VmHWM", "Pss", "Anonymous", "AnonHugePages"))
    return ProcessMemory(*(1024 * int(value) for value in kilobytes))


def huge_pages() -> str | None:
    """When the kernel gives out transparent huge pages: ``always``, ``madvise`` (to who asks), ``never``, or None."""
    words = _text(Path("/sys/kernel/mm/transparent_hugepage/enabled")).split()
    return next((word[1:-1] for word in words if word.startswith("[")), None)


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    block = _text(_PROC / "cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """This process's cgroup and those above it, in version 2's tree and in the controller's own of version 1."""
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        roots = (_CGROUPS / names, _CGROUPS / controller) if names else (_CGROUPS, _CGROUPS / "unified")
        root = next((root for root in roots if root.is_dir()), None)
        if root is None:
            continue
        # In a container the path can be the host's, which isn't mounted here: the root is the container's own then.
        folder = root / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(root) and above.is_dir())


def _reclaimable(folder: Path) -> int:
    """Bytes of file pages in a cgroup's usage that the kernel drops when memory is asked for."""
    fields = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
