"""A command that starts once more with memory in huge pages.

A bundle's weights are gigabytes that every step reads once, and with pages of 4 KB looking up addresses takes a seventh
of a step. glibc's allocator asks the kernel for pages of 2 MB where GLIBC_TUNABLES says so, which it reads when a
process starts. So a command that opens a session starts itself again: the same process by its number, its streams,
and its arguments.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from glm4export.machine import huge_pages
from glm4runtime import signals

_TUNABLES = "GLIBC_TUNABLES"
_OURS = "glibc.malloc.hugetlb"  # glibc 2.35 and later: 1 asks for transparent huge pages by madvise
_BEFORE = "GLM4EXPORT_TUNABLES"  # in the second start: what GLIBC_TUNABLES was in the first


def start_with_huge_pages() -> None:
    """Replace this process by one whose allocator asks for huge pages, where those are to be asked for.

    Nothing happens in the process that it is replaced by, where the kernel gives them to all or to nobody, with another
    C library, or where the user's GLIBC_TUNABLES says something of them: ``glibc.malloc.hugetlb=0`` is the way to do
    without. The children of the new process have the environment of the old one.
    """
    before = os.environ.pop(_BEFORE, None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ENDING)
        os.environ.pop(_TUNABLES, None)
        if before:
            os.environ[_TUNABLES] = before
        return
    tunables = os.environ.get(_TUNABLES, "")
    if _OURS in tunables or huge_pages() != "madvise" or not _glibc() or not sys.executable:
        return
    added = f"{tunables}:{_OURS}=1" if tunables else f"{_OURS}=1"
    environment = {**os.environ, _TUNABLES: added, _BEFORE: tunables}
    # What arrives meanwhile waits for the new process's handlers: here a handler may come too late to run.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)
    with suppress(OSError):  # no room for the longer environment, an interpreter that was replaced
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ENDING)


def _glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc ")
    except (ValueError, OSError):  # another library doesn't know the name
        return False
