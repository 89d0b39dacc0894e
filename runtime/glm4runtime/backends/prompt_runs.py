"""Where the runs of a prompt begin and end, so that its rows have the same bits however it is given. Pure.

Kernels choose their way by how many tokens a run has; runs whose widths are multiples of a *granule* agree to the bit
(:mod:`glm4runtime.backends.invariance`). A granule of 1 asks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator


def prompt_runs(first: int, end: int, *, width: int, granule: int, grid: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of each run of a prompt's rows ``first`` to ``end``; at least one.

    They begin on multiples of ``grid``, the first one in front of ``first`` where need be, and are ``width`` rows
    apart, less what is over a multiple of ``granule`` (width and grid are at least that). :func:`run_start` gives the
    last one its width.
    """
    width -= width % granule
    first -= first % grid
    while end - first > width:
        yield first, first + width
        first += width
    yield first, end


def run_start(first: int, end: int, granule: int) -> int:
    """Where the run that writes rows ``first`` to ``end`` begins: as much earlier as its width needs.

    From row 0 nothing is in front; the run is padded behind its end then, :func:`lacking` says by how much.
    """
    return max(0, first - lacking(end - first, granule))


def lacking(count: int, granule: int) -> int:
    """What ``count`` rows lack to a multiple of the granule."""
    return -count % granule
