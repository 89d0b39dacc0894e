"""The graphs of the embedded model, as reviewed: graphs/golden, rewritten by ``python tools/golden.py``."""

from __future__ import annotations

from tools.golden import GOLDEN, golden_listings


def test_listings_are_the_reviewed_ones() -> None:
    stored = {str(path.relative_to(GOLDEN)): path.read_text(encoding="utf-8") for path in GOLDEN.rglob("*.txt")}
    current = golden_listings()
    assert current.keys() == stored.keys()
    changed = [name for name in current if current[name] != stored[name]]
    assert not changed, f"{changed} changed; if that is meant, run `python tools/golden.py` and review the diff"
