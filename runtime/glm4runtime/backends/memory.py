"""How much memory there is to be had, asked before much of it is: Linux grants more than it has, and kills later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def memory_bytes() -> tuple[int, int]:
    """Total and available memory in bytes, as far as this process's cgroup lets it have them."""
    lines = (line.split() for line in text_of(PROC / "meminfo").splitlines())
    fields = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    total, available = fields["MemTotal"], fields["MemAvailable"]
    for folder in cgroup_folders("memory"):
        limit = number_in(folder / "memory.max") or number_in(folder / "memory.limit_in_bytes")
        if limit is None or limit >= fields["MemTotal"]:  # no limit: `max`, or a number near 2**63
            continue
        used = number_in(folder / "memory.current") or number_in(folder / "memory.usage_in_bytes") or 0
        total = min(total, limit)
        available = min(available, limit - max(0, used - _reclaimable(folder)))
    return total, max(0, available)


def cgroup_folders(controller: str) -> Iterator[Path]:
    """This process's cgroup and those above it, in version 2's tree and in the controller's own of version 1."""
    for line in text_of(PROC / "self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        roots = (CGROUPS / names, CGROUPS / controller) if names else (CGROUPS, CGROUPS / "unified")
        root = next((root for root in roots if root.is_dir()), None)
        if root is None:
            continue
        # In a container the path can be the host's, which isn't mounted here: the root is the container's own then.
        folder = root / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(root) and above.is_dir())


def _reclaimable(folder: Path) -> int:
    """Bytes of file pages in a cgroup's usage that the kernel drops when memory is asked for."""
    fields = dict(line.split() for line in text_of(folder / "memory.stat").splitlines())
    return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)


def number_in(path: Path) -> int | None:
    """The number that a file of the system holds; None for a word, or where there's no such file."""
    text = text_of(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def text_of(path: Path) -> str:
    """What a file of the system says; nothing where there's none."""
    try:
        return path.read_text()
    except OSError:
        return ""
