"""Token ids to an answer as it comes: text, where it stops, and the tool calls in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from glm4runtime.generation import Generation
from glm4runtime.text.answers import ToolCall, split_answer
from glm4runtime.text.stop import StopStrings
from glm4runtime.text.tokenizer import Tokenizer
from glm4runtime.text.turn import ASSISTANT

_UNREAD: Any = object()


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
