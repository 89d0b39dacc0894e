"""Facts about the machine that a comparison's numbers depend on."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def read_bandwidth(threads: int, megabytes: int = 1024, passes: int = 6) -> float:
    """Bytes a second that ``threads`` threads read together from an array far larger than the caches (best pass)."""
    parts = [np.ones(megabytes * 2**20 // 4 // threads, np.float32) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best


@dataclass(frozen=True)
class Machine:
    """What was measured and found on this machine; bandwidth in bytes per second."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    load_average: float
    read_bandwidth: float

    def describe(self) -> str:
        """The facts on one line, and a warning on a busy machine, whose numbers mean little."""
        line = (
            f"{self.cpu} ({', '.join(self.flags)}), {self.threads} of {self.cores} cores, "
            f"{self.memory_bytes / 2**30:.0f} GiB, reads {self.read_bandwidth / 1e9:.1f} GB/s"
        )
        busy = self.load_average > 0.5
        return line + (f"\nWARNING: other work is running (load average {self.load_average:.1f})" if busy else "")


def cpu_seconds(process: int | None = None) -> float:
    """CPU time spent so far by a process, or by the whole machine; 0 where there is no /proc."""
    path = Path("/proc/stat" if process is None else f"/proc/{process}/stat")
    if not path.is_file():
        return 0.0
    if process is None:  # user, nice, system, idle, iowait, irq, softirq, steal
        fields = [int(field) for field in path.read_text().splitlines()[0].split()[1:9]]
        ticks = sum(fields) - sum(fields[3:5])
    else:  # utime and stime, counted from behind the name, which may hold spaces
        ticks = sum(int(field) for field in path.read_text().rpartition(")")[2].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def machine(threads: int) -> Machine:
    """CPU, memory, load and read bandwidth of this machine."""
    cpu, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", fields.get("Features", ""))
    return Machine(
        cpu=cpu,
        flags=tuple(flag for flag in _FLAGS if flag in flags.split()),
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=os.getloadavg()[0],
        read_bandwidth=read_bandwidth(threads),
    )
