"""What an answer took, as a line for a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm4runtime.generation import Generation


class Rates:
    """Times of one answer, from its making on."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: float | None = None

    def token(self) -> None:
        """One came."""
        if self._first is None:
            self._first = time.monotonic()

    def tell(self, generation: Generation, finish_reason: str | None) -> None:
        """On a terminal, a line on standard error."""
        if not sys.stderr.isatty():
            return
        now = time.monotonic()
        first = self._first or now
        reused = f" ({generation.reused_tokens} cached)" if generation.reused_tokens else ""
        text = f"{generation.prompt_tokens} prompt tokens{reused}, first token after {first - self._start:.2f} s, "
        text += f"{generation.completion_tokens} tokens"
        if generation.completion_tokens > 1:
            text += f" at {(generation.completion_tokens - 1) / max(now - first, 1e-9):.1f} tok/s"
        guesses = generation.lookup
        if guesses.drafted:
            text += f" in {guesses.runs} runs, {guesses.accepted} of {guesses.drafted} guesses right"
        print(f"[{text}, ended by {finish_reason or 'Ctrl-C'}]", file=sys.stderr)
