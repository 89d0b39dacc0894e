"""Streams: tool calls by tokens, stop strings across tokens, and what a terminal shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4runtime.contract import UserError
from glm4runtime.generation import Generation
from glm4runtime.text.answers import ToolCall
from glm4runtime.text.stop import StopStrings, split_stop
from glm4runtime.text.stream import TextStream
from glm4runtime.text.tokenizer import Tokenizer
from tests.helpers.interrupts import Interrupt
from tests.helpers.tokenizers import make_raw

RAW = make_raw()
RAW.add_special_tokens(["<|assistant|>", "<|system|>"])
TOKENIZER = Tokenizer(RAW)
SEPARATOR = cast(int, TOKENIZER.token_id("<|assistant|>"))
OBSERVATION = cast(int, TOKENIZER.token_id("<|observation|>"))
BYTE = {TOKENIZER.token_bytes(i): i for i in range(RAW.get_vocab_size()) if len(TOKENIZER.token_bytes(i)) == 1}


class Tokens(Iterator[int]):
    """A generation of given tokens, the last of which may be a stop token."""

    def __init__(self, tokens: Sequence[int], stop: int | None = None) -> None:
        self.finish_reason: str | None = None
        self.stop_token: int | None = None
        self._tokens, self._stop = iter(tokens), stop

    def __next__(self) -> int:
        token = next(self._tokens, None)
        if token is None:
            self.stop_token, self.finish_reason = self._stop, "length" if self._stop is None else "stop"
            raise StopIteration
        return token


def bytewise(text: str) -> list[int]:
    """Text spelled out byte by byte: no token of it is special, whatever it reads."""
    return [BYTE[bytes([byte])] for byte in text.encode()]


def stream(*turns: str, spell: Any = None, stop: Sequence[str] = (), end: int | None = OBSERVATION) -> TextStream:
    """A stream of texts with an ``<|assistant|>`` token between two."""
    tokens: list[int] = []
    for i, turn in enumerate(turns):
        tokens += [SEPARATOR] * bool(i) + (spell or TOKENIZER.encode)(turn)
    return TextStream(TOKENIZER, cast(Generation, Tokens(tokens, end)), stop)


BEIJING, SHANGHAI = 'weather\n{"city": "北京"}', 'weather\n{"city": "上海"}'
CALLS = [ToolCall("weather", {"city": "北京"}), ToolCall("weather", {"city": "上海"})]


@pytest.mark.parametrize("spell", [None, bytewise], ids=["tokens", "bytes"])
def test_several_calls_in_one_answer(spell: Any) -> None:
    answer = stream(BEIJING, SHANGHAI, spell=spell)
    assert answer.read() == answer.text == f"{BEIJING}\n{SHANGHAI}"
    assert answer.tool_calls == CALLS and answer.content == ""
    assert (answer.finish_reason, answer.stop_text) == ("stop", "<|observation|>")


@pytest.mark.parametrize(
    "turns, calls, content",
    [
        ([f"\n{BEIJING}"], CALLS[:1], ""),
        (["\n今天晴。"], [], "\n今天晴。"),
        (["\n我查一下。", BEIJING, SHANGHAI], CALLS, "\n我查一下。"),
        ([BEIJING, "\n好了。", SHANGHAI, "再见"], CALLS, "\n好了。\n再见"),
        ([f"我查一下。\n{BEIJING}"], [], f"我查一下。\n{BEIJING}"),  # in one turn: words
        (["", BEIJING], CALLS[:1], ""),
        ([BEIJING, ""], CALLS[:1], ""),
        ([BEIJING, 'weather\n{"city": '], CALLS[:1], 'weather\n{"city": '),  # broken
        ([BEIJING, "weather\n{'city': 1}", SHANGHAI], CALLS, "weather\n{'city': 1}"),
        ([BEIJING + "!"], [], BEIJING + "!"),
        (['f\n{"x": NaN}'], [], 'f\n{"x": NaN}'),
        (["<think>嗯</think>\n" + BEIJING], CALLS[:1], "<think>嗯</think>"),
        (['f\n{"a": "</think>"}'], [ToolCall("f", {"a": "</think>"})], ""),
        (["<think>" + BEIJING], [], "<think>" + BEIJING),
    ],
)
def test_words_and_calls(turns: list[str], calls: list[ToolCall], content: str) -> None:
    for spell in (None, bytewise):
        answer = stream(*turns, spell=spell)
        answer.read()
        assert (answer.tool_calls, answer.content) == (calls, content)


def test_a_marker_spelled_as_text_is_no_token() -> None:
    inside = 'f\n{"a": "x<|assistant|>y\\n{}"}'
    answer = stream(inside, BEIJING, spell=bytewise)
    assert answer.read() == f"{inside}\n{BEIJING}"
    assert answer.tool_calls == [ToolCall("f", {"a": "x<|assistant|>y\n{}"}), CALLS[0]] and answer.content == ""
    answer = stream(f"{BEIJING}<|assistant|>{SHANGHAI}", spell=bytewise)
    assert answer.read() == answer.content == f"{BEIJING}<|assistant|>{SHANGHAI}"
    assert answer.tool_calls == []


def test_calls_while_they_come() -> None:
    answer = stream(BEIJING, SHANGHAI, spell=bytewise)
    seen = []
    for _ in answer:
        seen.append(len(answer.tool_calls))
    assert seen == sorted(seen) and set(seen) == {0, 1, 2}


def test_half_a_character_in_front_of_a_separator() -> None:
    tokens = [*bytewise("你")[:2], SEPARATOR, *bytewise("好")]
    answer = TextStream(TOKENIZER, cast(Generation, Tokens(tokens)))
    assert answer.read() == "\ufffd\n好" and answer.content == "\ufffd\n好" and answer.finish_reason == "length"


# stop strings


def naive(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: the first end of any, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


ALPHABET = st.text(alphabet="ab你\n", max_size=12)


@settings(deadline=None, max_examples=400)
@given(st.lists(ALPHABET, max_size=8), st.lists(ALPHABET.filter(bool), max_size=3))
def test_any_split_gives_the_same_text(pieces: list[str], stops: list[str]) -> None:
    expected, found = naive("".join(pieces), stops)
    for split in (pieces, ["".join(pieces)], list("".join(pieces))):
        strings, text = StopStrings(stops), ""
        for piece in split:
            text += strings.push(piece)
            assert expected.startswith(text)  # nothing is taken back
            if strings.found is not None:
                break
        else:
            text += strings.finish()
        assert (text, strings.found) == (expected, found)


@settings(deadline=None, max_examples=100)
@given(ALPHABET, ALPHABET, st.lists(ALPHABET.filter(bool), min_size=1, max_size=3))
def test_streams_of_tokens_and_of_bytes_stop_alike(first: str, second: str, stops: list[str]) -> None:
    expected, found = naive(f"{first}\n{second}" if first else second, stops)
    for spell in (TOKENIZER.encode, bytewise):
        answer = stream(first, second, spell=spell, stop=stops, end=None)
        assert answer.read() == answer.text == expected
        assert (answer.finish_reason, answer.stop_text) == (("stop", found) if found else ("length", None))
        assert list(answer) == []


def test_the_end_is_held_back_no_longer_than_it_may_be_a_stop() -> None:
    strings = StopStrings(["STOP", "OPEN"])
    assert [strings.push(piece) for piece in ("aS", "TO", "x", "O", "P", "E", "x", "ST")] == [
        *("a", "", "STOx", "", "", "", "OPEx", "")
    ]
    assert strings.finish() == "ST"


def test_a_call_is_cut_by_a_stop_string() -> None:
    answer = stream(BEIJING, SHANGHAI, stop=["上海"])
    assert answer.read() == f'{BEIJING}\nweather\n{{"city": "'
    assert answer.tool_calls == CALLS[:1] and answer.content == 'weather\n{"city": "'
    assert answer.generation.finish_reason is None


def test_what_stop_may_be() -> None:
    vocabulary = TOKENIZER.vocab_size
    assert split_stop("ab", TOKENIZER, vocabulary) == ([], ["ab"])
    assert split_stop(3, None, vocabulary) == ([3], [])
    assert split_stop(["<|user|>", "\n", 7], TOKENIZER, vocabulary) == (
        [TOKENIZER.token_id("<|user|>"), 7],
        ["<|user|>", "\n"],
    )
    assert split_stop((), None, vocabulary) == ([], [])
    for wrong in ("", [""], -1, vocabulary, 1.5, None, b"x", [True], [1.0], [None]):
        with pytest.raises(UserError, match=rf"stop: expected token ids in 0\.\.{vocabulary - 1} or strings"):
            split_stop(cast(Any, wrong), TOKENIZER, vocabulary)


def test_arguments_are_plain_json() -> None:
    answer = stream('f\n{"a": [1, 2.5, null, {"b": "é"}]}')
    answer.read()
    assert json.dumps(answer.tool_calls[0].arguments, ensure_ascii=False) == '{"a": [1, 2.5, null, {"b": "é"}]}'


def test_an_interrupted_read_loses_no_text() -> None:
    """Half characters held back, a separator, and a stop string that begins and isn't one."""
    turns = ("Grüße, 世界! En", "name\n{}")

    def answer() -> TextStream:
        return stream(*turns, spell=bytewise, stop=["End", "name\n{}!"])

    wanted = answer().read()
    with Interrupt(0) as count:
        answer().read()
    for at in range(1, count.lines, max(1, count.lines // 400)):
        text = answer()
        with Interrupt(at):
            try:
                text.read()
            except KeyboardInterrupt:
                text.read()
        assert text.text == wanted
