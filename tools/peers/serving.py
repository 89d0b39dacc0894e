"""Many requests, so many at once: what a runtime is asked in ``tools/compare_serving.py``, and when its tokens came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peers.protocol import Groups


class Server(Protocol):
    """A model in memory with caches for several sequences."""

    name: str  # runtime and version
    settings: str  # what was chosen for it, its defaults left out
    files_bytes: int
    groups: Groups  # empty where the peer's format doesn't tell

    def answer(self, prompts: Sequence[list[int]], new_tokens: int, at_once: int) -> list[Times]:
        """Greedy answers of exactly so many tokens; ``at_once`` are under way, and the next begins as one is done."""
        ...


@dataclass
class Times:
    """Of one answer: when it was asked for, and when each of its tokens came, by ``time.perf_counter``."""

    began: float = field(default_factory=time.perf_counter)
    at: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def came(self, *tokens: int) -> None:
        """These tokens are here now. Where they are several, their times are spread over the wait for them."""
        before, now = self.at[-1] if self.at else self.began, time.perf_counter()
        self.at += [before + (now - before) * (index + 1) / len(tokens) for index in range(len(tokens))]
        self.tokens += tokens

    def as_json(self) -> dict[str, Any]:
        """Seconds from ``began`` to each token, and the tokens."""
        return {"after": [at - self.began for at in self.at], "tokens": self.tokens}
