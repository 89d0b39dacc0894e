"""Tokens of the assistant's answer to what an API sends: thought, content and tool calls, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from glm4runtime.text.answers import ToolCall
from glm4runtime.text.stop import StopStrings
from glm4runtime.text.tokenizer import Tokenizer
from glm4runtime.text.turn import ASSISTANT, THINK, THINK_END, Part, Turn

__all__ = ["ASSISTANT", "THINK", "THINK_END", "AnswerDelta", "AnswerParser"]


@dataclass(frozen=True)
class AnswerDelta:
    """What one token added, often nothing. ``tool_calls`` are whole ones."""

    thought: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class AnswerParser:
    r"""A state machine over the tokens of an answer; it gives what is certain, and takes nothing back.

    - An answer has turns, with ``<|assistant|>`` tokens between them. Each may begin with a thought,
      ``<think>…</think>``; what follows is a tool call if it is one and nothing else, otherwise words. Only words are
      ``content``, a newline between those of two turns.
    - The marks of a thought are found as text: some vocabularies have tokens for them, others spell them out.
    - Stop strings are found in content only, across tokens and turns; neither they nor what follows is given.
    - A call is given whole, at the first token behind it: words there would make all of it words. Broken calls, and
      those that the end cuts off, are content.
    - Blank lines in front of words are the template's (``<|assistant|>\n``, ``</think>\n\n``) and are left out, and so
      is whitespace around a thought.

    ``stopped`` is the stop string that was found, or None; what is pushed from then on is passed over.
    ``finish_reason`` is None until :meth:`finish`; it is ``tool_calls``, as OpenAI's API has it, for a ``stop`` of any
    kind behind calls: who asked waits for their outcomes, also where a stop string ended words behind them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_strings: Sequence[str] = (),
        thinking: Literal["auto"] | bool = "auto",
        tools: bool = False,
    ) -> None:
        """Begin an answer.

        thinking: True where the prompt ended inside ``<think>``; "auto" where the answer may open a thought itself;
        False where ``<think>`` is content. tools: the model was told of tools; without them, what looks like a call is
        content. With thinking=False and tools=False the text is given exactly as it is, which is for completions.
        """
        self.stopped: str | None = None
        self.finish_reason: str | None = None
        self._decoder = tokenizer.stream()
        self._stop = StopStrings(stop_strings)
        self._opens, self._tools = thinking is not False, tools
        self._turn: Turn | None = None
        self._separator: int | None = None
        self._marks: dict[int, str] = {}
        if self._opens or tools:
            self._turn = Turn(opens=self._opens, opened=thinking is True, tools=tools)
            self._separator = tokenizer.token_id(ASSISTANT)
            # Where they are special tokens, the decoder leaves them out.
            ids = ((tokenizer.token_id(mark), mark) for mark in (THINK, THINK_END))
            self._marks = {i: mark for i, mark in ids if i is not None and tokenizer.is_special(i)}
        self._words_came = self._called = False
        self._new_turn = False  # the next words begin one
        self._thought_came = self._new_thought = False

    def push(self, token: int) -> AnswerDelta:
        """What is certain now and wasn't before this token. Raises UserError for a negative id, or one from 2**32."""
        if self.stopped is not None:
            return AnswerDelta()
        if self._turn is None:
            return AnswerDelta(content=self._until_stop(self._decoder.push(token)))
        if token == self._separator:
            parts = self._end_turn()
            self._turn = Turn(opens=self._opens, opened=False, tools=self._tools)
            self._new_turn, self._new_thought = self._words_came, self._thought_came
            return AnswerDelta(*parts)
        mark = self._marks.get(token)
        piece = self._decoder.push(token) if mark is None else self._decoder.finish() + mark
        return AnswerDelta(*self._joined(self._turn.push(piece)))

    def finish(self, reason: str) -> AnswerDelta:
        """The rest. reason: why the tokens ended: ``stop``, ``length``, or whatever it was."""
        rest = AnswerDelta()
        if self.stopped is None:
            thought, content, calls = self._end_turn()
            rest = AnswerDelta(thought, content + self._stop.finish(), calls)
        self.finish_reason = "tool_calls" if reason == "stop" and self._called else reason
        return rest

    def _end_turn(self) -> tuple[str, str, tuple[ToolCall, ...]]:
        if self._turn is None:
            return "", self._until_stop(self._decoder.finish()), ()
        first = self._joined(self._turn.push(self._decoder.finish()))
        if self.stopped is not None:
            return first
        last = self._joined(self._turn.finish())
        return first[0] + last[0], first[1] + last[1], first[2] + last[2]

    def _joined(self, parts: Iterable[Part]) -> tuple[str, str, tuple[ToolCall, ...]]:
        """Thought, content and calls of a turn's parts, in front of a stop string."""
        thought, content, calls = "", "", []
        for part in parts:
            if isinstance(part, ToolCall):
                calls.append(part)
                self._called = True
            elif part[0] == "thought":
                thought += "\n" * self._new_thought + part[1]
                self._thought_came, self._new_thought = True, False
            else:
                content += self._until_stop("\n" * self._new_turn + part[1])
                self._words_came, self._new_turn = True, False
                if self.stopped is not None:
                    break
        return thought, content, tuple(calls)

    def _until_stop(self, piece: str) -> str:
        certain = self._stop.push(piece)
        self.stopped = self._stop.found
        return certain
