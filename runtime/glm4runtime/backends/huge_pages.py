"""Memory that a process has already, put into huge pages: ``load(..., huge_pages=True)``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_HUGE = 2 << 20  # bytes of a huge page, or a multiple, on the processors that have them; the kernel clamps to its own
_LEAST = 16 << 20  # smaller mappings, threads' stacks among them, are left alone
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # Linux's numbers on every processor but parisc; the latter since 6.1


def collapse() -> None:
    """Ask for huge pages under the process's large anonymous mappings, and to copy into them what is there: seconds.

    A part that was never written stays free of memory. What the kernel refuses, or doesn't know, stays as it is.
    """
    with suppress(OSError, AttributeError):  # no such file, or library
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for first, end in _mappings(Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")):
            if madvise(first, end - first, _MADV_HUGEPAGE) == 0:
                madvise(first, end - first, _MADV_COLLAPSE)


def _mappings(maps: str) -> Iterator[tuple[int, int]]:
    """First and last address of the whole huge pages in every large private, writable mapping of no file."""
    for line in maps.splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights != "rw-p" or inode != "0" or (name and name[0].strip() != "[heap]" and "[anon" not in name[0]):
            continue
        first, end = (int(address, 16) for address in addresses.split("-"))
        first, end = -(-first // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if end - first >= _LEAST:
            yield first, end
