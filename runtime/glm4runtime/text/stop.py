"""Where a text ends: stop tokens, and stop strings across token borders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4runtime.contract import UserError
from glm4runtime.text.tokenizer import Tokenizer

Stop = str | int | Sequence[str | int]


def stop_items(stop: Stop) -> list[object]:
    """One or several, as a list."""
    return list(stop) if isinstance(stop, list | tuple | set | frozenset) else [stop]


def split_stop(stop: Stop, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list[int], list[str]]:
    """Token ids and strings out of ``stop``; a special token's text is both. Raises UserError for what is neither."""
    ids, strings = [], []
    for item in stop_items(stop):
        if isinstance(item, str) and not _is_unicode(item):
            raise UserError(f"stop: {item!r} is not valid Unicode, so no answer holds it")
        if isinstance(item, str) and item:
            strings.append(item)
            token = None if tokenizer is None else tokenizer.token_id(item)
            if tokenizer is not None and token is not None and tokenizer.is_special(token):  # text doesn't show it
                ids.append(token)
        elif isinstance(item, int | np.integer) and not isinstance(item, bool) and 0 <= item < vocab_size:
            ids.append(int(item))
        else:
            raise UserError(
                f"stop: expected token ids in 0..{vocab_size - 1} or strings that aren't empty, found {item!r}"
            )
    return ids, strings


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


class StopStrings:
    """Passes text on up to the first stop string, even where that is spread over several pieces.

    That is the one that is complete first, of several the longest. ``found`` is it. The end of the text is held back
    where it may turn out to be the beginning of one: ``held``. ``rest`` is what the last piece held behind ``found``.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = sorted(set(strings), key=len, reverse=True)
        self.held = ""
        self.rest = ""

    def push(self, piece: str) -> str:
        """The text that is certain now and wasn't before this piece."""
        text = self.held + piece
        ends = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            end, start, self.found = min(ends)
            self.rest = text[end:]
            self.held = ""
            return text[:start]
        held = max((self._overlap(text, string) for string in self._strings), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, now that no more comes."""
        held, self.held = self.held, ""
        return held

    def state(self) -> tuple[str | None, str]:
        """What :meth:`restore` takes."""
        return self.found, self.held

    def restore(self, state: tuple[str | None, str]) -> None:
        """Go back to what was seen then."""
        self.found, self.held = state

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest end of ``text`` that ``string`` begins with."""
        longest = min(len(string) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
