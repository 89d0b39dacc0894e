"""Token ids to an answer as it comes: text, where it stops, and the tool calls in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from glm4runtime.contract import UserError
from glm4runtime.generation import Generation
from glm4runtime.text.answers import ToolCall, split_answer
from glm4runtime.text.tokenizer import Tokenizer

ASSISTANT = "<|assistant|>"  # the token between an answer's words and calls, each of them a turn of its own

Stop = str | int | Sequence[str | int]
_UNREAD: Any = object()


def stop_items(stop: Stop) -> list[object]:
    """One or several, as a list."""
    return list(stop) if isinstance(stop, list | tuple | set | frozenset) else [stop]


def split_stop(stop: Stop, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list[int], list[str]]:
    """Token ids and strings out of ``stop``; a special token's text is both. Raises UserError for what is neither."""
    ids, strings = [], []
    for item in stop_items(stop):
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


class StopStrings:
    """Passes text on up to the first stop string, even where that is spread over several pieces.

    That is the one that is complete first, of several the longest. ``found`` is it. The end of the text is held back
    where it may turn out to be the beginning of one.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain now and wasn't before this piece."""
        text = self._held + piece
        ends = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        held = max((self._overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, now that no more comes."""
        held, self._held = self._held, ""
        return held

    def state(self) -> tuple[str | None, str]:
        """What :meth:`restore` takes."""
        return self.found, self._held

    def restore(self, state: tuple[str | None, str]) -> None:
        """Go back to what was seen then."""
        self.found, self._held = state

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest end of ``text`` that ``string`` begins with."""
        longest = min(len(string) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


class TextStream(Iterator[str]):
    """Pieces of text as they become certain; never half a character, nor any of a stop string.

    ``text`` holds what came so far, as a terminal should show it: without special tokens, a new line where
    ``<|assistant|>`` parts words and calls. ``tool_calls`` and ``content`` are the same answer as a program reads it.
    A read that is interrupted changes nothing, as with :class:`~glm4runtime.generation.Generation`.
    """

    def __init__(self, tokenizer: Tokenizer, generation: Generation, stop: Sequence[str] = ()) -> None:
        """stop: strings that end the text and aren't part of it."""
        self.generation = generation
        self.text = ""
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._filter = StopStrings(stop)
        self._separator = tokenizer.token_id(ASSISTANT)
        self._decoded = 0  # characters, those held back included
        self._breaks: list[tuple[int, int]] = []  # where segments end, and where the next begin
        self._token: Any = _UNREAD  # the one whose text isn't out yet; None at the end
        self._done = False

    @property
    def finish_reason(self) -> str | None:
        """``stop``, ``length``, or None while running."""
        return "stop" if self._filter.found is not None else self.generation.finish_reason

    @property
    def stop_text(self) -> str | None:
        """What ended it: the stop string, or the stop token as text, such as ``<|user|>`` or ``<|observation|>``.

        None where nothing did.
        """
        if self._filter.found is not None:
            return self._filter.found
        token = self.generation.stop_token
        return None if token is None else self._tokenizer.decode([token], skip_special_tokens=False)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls in what came so far, in their order. Told apart by tokens: text that looks like one is no token."""
        return split_answer(self._segments())[1]

    @property
    def content(self) -> str:
        """The words in what came so far: ``text`` without its tool calls. A call that is broken is words."""
        return split_answer(self._segments())[0]

    def _segments(self) -> list[str]:
        segments, start = [], 0
        for end, following in self._breaks:
            if end > len(self.text):
                break
            segments.append(self.text[start:end])
            start = following
        return [*segments, self.text[start:]]

    def __next__(self) -> str:
        while not self._done:
            if self._token is _UNREAD:
                self._token = next(self.generation, None)
            state = self._state()
            try:
                piece = self._filter.push(self._decode(self._token))
                if self._token is None:
                    piece += self._filter.finish()
                self._done = self._token is None or self._filter.found is not None
                self.text, self._token = self.text + piece, _UNREAD
                if piece:
                    return piece
            except BaseException:  # Ctrl-C: the token is taken again at the next read
                self._restore(state)
                raise
        raise StopIteration

    def _state(self) -> tuple[Any, ...]:
        own = (self.text, self._token, self._decoded, len(self._breaks), self._done)
        return own, self._decoder.state(), self._filter.state()

    def _restore(self, state: tuple[Any, ...]) -> None:
        own, decoder, strings = state
        self.text, self._token, self._decoded, breaks, self._done = own
        del self._breaks[breaks:]
        self._decoder.restore(decoder)
        self._filter.restore(strings)

    def _decode(self, token: int | None) -> str:
        if token is None:
            piece = self._decoder.finish()
        elif token == self._separator:
            piece = self._decoder.finish()
            end = self._decoded + len(piece)
            piece += "\n" if end else ""
            self._breaks.append((end, self._decoded + len(piece)))
        else:
            piece = self._decoder.push(token)
        self._decoded += len(piece)
        return piece

    def read(self) -> str:
        """The whole text, waiting for the end."""
        for _ in self:
            pass
        return self.text
