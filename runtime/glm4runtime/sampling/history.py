"""The tokens so far."""

from __future__ import annotations

import numpy as np

from glm4runtime.sampling.rows import Ids


class History:
    """Prompt and answer so far. Only its length ever changes behind the last token, so going back is exact."""

    def __init__(self, prompt: Ids) -> None:
        self._buffer = np.empty(max(256, 2 * len(prompt)), np.int64)
        self._buffer[: len(prompt)] = prompt
        self._start = self.length = len(prompt)

    @property
    def tokens(self) -> Ids:
        """All of them, a view."""
        return self._buffer[: self.length]

    @property
    def answer(self) -> Ids:
        """Those behind the prompt, a view."""
        return self._buffer[self._start : self.length]

    @property
    def answered(self) -> int:
        """How many these are."""
        return self.length - self._start

    def append(self, token: int) -> None:
        """One more token of the answer."""
        if self.length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self.length] = token
        self.length += 1
