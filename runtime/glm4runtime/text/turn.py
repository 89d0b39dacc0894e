"""One turn of an answer, told apart while its text comes: a thought, then a tool call or words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from glm4runtime.text.answers import ToolCall, read_call, read_object_call
from glm4runtime.text.stop import StopStrings

ASSISTANT = "<|assistant|>"  # the token between an answer's words and calls, each of them a turn of its own
THINK, THINK_END = "<think>", "</think>"

# A call's beginning, up to its JSON: GLM-4-0414's, with OpenAI's limit of 64 characters to a name, or Rumination's.
_HEAD = re.compile(r"""\s*(?:[\w.-]{1,64}[ \t]*\n\s*(?=\{)|(?=\{\s*"name"\s*:))""")
# What may still become one.
_BEGUN = re.compile(r"""\s*(?:[\w.-]{1,64}[ \t]*(?:\n\s*)?|\{\s*(?:"(?:n(?:a(?:m(?:e(?:"\s*)?)?)?)?)?)?)?""")
_NO_OBJECT = re.compile(r"""\{\s*[^\s"}]""")
_BRACES = re.compile(r"""["\\{}]""")
_BLANK_LINES = re.compile(r"\s*\n")

Part = tuple[str, str] | ToolCall  # ("thought" or "words", a piece of it), or a whole call


def in_thought(prompt: str) -> bool:
    """Whether a rendered conversation leaves the assistant inside a thought."""
    return prompt.rstrip().endswith(THINK)


class Turn:
    """Takes a turn's text in pieces and gives its parts, each as soon as it's certain which it is.

    How the text is cut into pieces makes no difference to the parts put together.
    """

    def __init__(self, *, opens: bool, opened: bool, tools: bool) -> None:
        """opens: it may begin with ``<think>``. opened: it begins inside a thought. tools: it may be a call."""
        self._tools = tools
        self._held = ""  # text that may still turn out to be one or the other
        self._behind_thought = Turn._head if tools else Turn._blank
        # States are not bound to this object: it would hold itself, and go no sooner than the garbage collector comes.
        self._state: _State = self._behind_thought
        if opens or opened:
            self._opened = opened
            self._state = Turn._opening
        self._end = StopStrings([THINK_END])
        self._space: str | None = None  # whitespace at the thought's end so far; None in front of its first word
        self._scan = _ObjectEnd()

    def push(self, piece: str) -> Iterator[Part]:
        """What is certain now and wasn't before this piece."""
        text, self._held = self._held + piece, ""
        return self._state(self, text) if text else iter(())

    def finish(self) -> Iterator[Part]:
        """The rest, now that the turn is over."""
        held, self._held = self._held, ""
        if self._state is Turn._thought:
            yield from self._trimmed(self._end.finish())
        elif self._state is Turn._opening and self._opened:
            yield from self._trimmed(held)
        elif self._state is Turn._call and (call := _call(held)) is not None:
            yield call
        elif held.strip():
            yield "words", _without_blank_lines(held)

    def _opening(self, text: str) -> Iterator[Part]:
        inside = text.lstrip()
        if inside.startswith(THINK):  # which some models repeat where the prompt has it
            yield from self._go(Turn._thought, inside[len(THINK) :])
        elif THINK.startswith(inside):
            self._held = text
        else:
            yield from self._go(Turn._thought if self._opened else self._behind_thought, text)

    def _thought(self, text: str) -> Iterator[Part]:
        yield from self._trimmed(self._end.push(text))
        if self._end.found:
            yield from self._go(self._behind_thought, self._end.rest)

    def _trimmed(self, text: str) -> Iterator[Part]:
        """Pieces of the thought without whitespace at its ends."""
        begun = self._space is not None
        text = (self._space or "") + text
        words = text.rstrip() if begun else text.strip()
        if words:
            yield "thought", words
        if begun or words:
            self._space = text[len(text.rstrip()) :]

    def _head(self, text: str) -> Iterator[Part]:
        if _HEAD.match(text):
            yield from self._go(Turn._call, text)
        elif _BEGUN.fullmatch(text):
            self._held = text
        else:
            yield from self._go(Turn._blank, text)

    def _call(self, text: str) -> Iterator[Part]:
        end = self._scan.push(text)
        if end is None or (not text[end:].strip() and _call(text) is not None):
            self._held = text
        else:
            yield from self._go(Turn._blank, text)

    def _blank(self, text: str) -> Iterator[Part]:
        if text.strip():
            yield from self._go(Turn._words, _without_blank_lines(text))
        else:
            self._held = text

    def _words(self, text: str) -> Iterator[Part]:
        yield "words", text

    def _go(self, state: _State, text: str) -> Iterator[Part]:
        self._state = state
        return self.push(text)


_State = Callable[[Turn, str], Iterator[Part]]


class _ObjectEnd:
    """Where the JSON object ends that begins at a text's first brace; looks at each character once as it grows."""

    def __init__(self) -> None:
        self._position, self._depth, self._in_string = 0, 0, False
        self._end: int | None = None

    def push(self, text: str) -> int | None:
        """The end, None if it isn't there yet, or 0 where the brace can't begin an object. text: all so far."""
        if self._end is None and _NO_OBJECT.match(text, text.index("{")):
            self._end = 0
        while self._end is None and (found := _BRACES.search(text, self._position)):
            self._position = found.end()
            sign = found[0]
            if sign == "\\":
                if found.end() == len(text):  # what it escapes hasn't come
                    self._position = found.start()
                    break
                self._position += 1
            elif sign == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if sign == "{" else -1
                if not self._depth:
                    self._end = self._position
        return self._end


def _call(text: str) -> ToolCall | None:
    return read_call(text) or read_object_call(text)


def _without_blank_lines(text: str) -> str:
    """Without those in front: the template's, or the model's behind its thought."""
    blank = _BLANK_LINES.match(text)
    return text[blank.end() :] if blank else text
