"""Progress on a terminal, silence in logs; notes in both."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int], None]  # told how many more bytes, or tokens, were dealt with


def note(text: str) -> None:
    """Tell on stderr what the user should know and needn't act on."""
    print(f"glm4export: note: {text}", file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say what is being done, and how long it took when it's done."""
    show = sys.stderr.isatty()
    start = time.monotonic()
    if show:
        print(f"  {name} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        if show:
            print(file=sys.stderr)
        raise
    if show:
        print(f"\r  {name} {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def byte_bar(total: int, what: str = "write weights") -> Iterator[Progress]:
    """A bar over ``total`` bytes with rate and time left."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=f"  {what}", leave=False, disable=None) as bar:
        yield bar.update


@contextmanager
def engine_line(name: str) -> Iterator[Callable[[str], None]]:
    """A line with what TensorRT is doing, and for how long; it tells no share of the work that could fill a bar."""
    from tqdm import tqdm

    with tqdm(bar_format=f"  build {name} {{desc}}{{elapsed}}", leave=False, disable=None) as line:
        yield lambda phase: line.set_description_str(f"{phase} ")


@contextmanager
def token_bar(total: int) -> Iterator[Progress]:
    """A bar over ``total`` tokens with rate and time left."""
    from tqdm import tqdm

    with tqdm(total=total, unit=" tokens", desc="  score", leave=False, disable=None) as bar:
        yield bar.update
