"""Answers to thought, content and tool calls: the same however they are cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from glm4runtime.contract import UserError
from glm4runtime.text.answers import ToolCall
from glm4runtime.text.assistant import AnswerDelta, AnswerParser
from glm4runtime.text.tokenizer import Tokenizer
from tests.helpers.tokenizers import make_raw


def tokenizer(special: Sequence[str] = (), plain: Sequence[str] = ()) -> Tokenizer:
    raw = make_raw()
    raw.add_special_tokens(["<|assistant|>", *special])
    raw.add_tokens(list(plain))
    return Tokenizer(raw)


#: Marks of thoughts as tokens that are text, as special ones (all of make_raw's vocabulary has <think>), and spelled.
TOKENIZER = tokenizer(plain=["</think>"])
SPECIAL = tokenizer(special=["<think>", "</think>"])
CALL = 'weather\n{"city": "北京", "note": "a {b} \\"c\\" \\\\"}'
CALLED = ToolCall("weather", {"city": "北京", "note": 'a {b} "c" \\'})

Whole = tuple[str, str, list[ToolCall], str | None]


def spelled(text: str, vocabulary: Tokenizer = TOKENIZER) -> list[int]:
    """Text byte by byte, except for ``<|assistant|>``, which is a token."""
    single = {vocabulary.token_bytes(i): i for i in range(vocabulary.vocab_size)}
    separator = cast(int, vocabulary.token_id("<|assistant|>"))
    turns = [[single[bytes([byte])] for byte in turn.encode()] for turn in text.split("<|assistant|>")]
    return [token for i, turn in enumerate(turns) for token in ([separator] * bool(i) + turn)]


def deltas(
    tokens: Sequence[int], vocabulary: Tokenizer = TOKENIZER, reason: str = "stop", **options: Any
) -> tuple[list[AnswerDelta], Any]:
    parser = AnswerParser(vocabulary, **options)
    pieces = []
    for token in tokens:
        pieces.append(parser.push(token))
        if parser.stopped is not None:
            break
    return [*pieces, parser.finish(reason)], parser


def read(tokens: Sequence[int], vocabulary: Tokenizer = TOKENIZER, **options: Any) -> Whole:
    pieces, parser = deltas(tokens, vocabulary, **options)
    calls = [call for piece in pieces for call in piece.tool_calls]
    return "".join(p.thought for p in pieces), "".join(p.content for p in pieces), calls, parser.stopped


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("\n今天晴。", {}, ("", "今天晴。", [], None)),
        ("\n\n    code\n", {}, ("", "    code\n", [], None)),
        (" \n\n", {}, ("", "", [], None)),
        ("<think>\n嗯 \n</think>\n\n晴。\n", {}, ("嗯", "晴。\n", [], None)),
        ("\n<think></think>晴。", {}, ("", "晴。", [], None)),
        ("嗯\n</think>\n晴。", {"thinking": True}, ("嗯", "晴。", [], None)),
        ("<think>嗯</think>晴。", {"thinking": True}, ("嗯", "晴。", [], None)),
        ("嗯 </thin", {"thinking": True}, ("嗯 </thin", "", [], None)),
        ("<thi", {"thinking": True}, ("<thi", "", [], None)),
        ("<thi", {}, ("", "<thi", [], None)),
        ("<think>嗯</think>b</think>", {}, ("嗯", "b</think>", [], None)),
        ("用 <think> 标记</think>", {}, ("", "用 <think> 标记</think>", [], None)),
        ("\n<think>嗯</think>\n", {"thinking": False}, ("", "\n<think>嗯</think>\n", [], None)),
        ("<think>嗯</think>", {"thinking": False, "tools": True}, ("", "<think>嗯</think>", [], None)),
        # calls
        (CALL, {"tools": True}, ("", "", [CALLED], None)),
        (f"\n{CALL} \n", {"tools": True}, ("", "", [CALLED], None)),
        (CALL, {}, ("", CALL, [], None)),
        (f"{CALL}<|assistant|>\nf\n{{}}", {"tools": True}, ("", "", [CALLED, ToolCall("f", {})], None)),
        (f"\n我查。<|assistant|>{CALL}<|assistant|>\n再见", {"tools": True}, ("", "我查。\n再见", [CALLED], None)),
        (f"<think>a</think>\n{CALL}", {"tools": True}, ("a", "", [CALLED], None)),
        (f"<think>a</think>x<|assistant|><think>b</think>{CALL}", {"tools": True}, ("a\nb", "x", [CALLED], None)),
        (f"<think>{CALL}", {"tools": True}, (CALL, "", [], None)),
        (f"{CALL}!", {"tools": True}, ("", f"{CALL}!", [], None)),
        (f"{CALL[:-1]}", {"tools": True}, ("", CALL[:-1], [], None)),
        (f"f\n{{}}<|assistant|>{CALL[:-4]}", {"tools": True}, ("", CALL[:-4], [ToolCall("f", {})], None)),
        (f"f\n{{'a': 1}}<|assistant|>{CALL}", {"tools": True}, ("", "f\n{'a': 1}", [CALLED], None)),
        ('f\n{"a": NaN}', {"tools": True}, ("", 'f\n{"a": NaN}', [], None)),
        ('f\n{"a": 1]}', {"tools": True}, ("", 'f\n{"a": 1]}', [], None)),
        ('f\n{"a" "b"}', {"tools": True}, ("", 'f\n{"a" "b"}', [], None)),
        ("f\n{ }", {"tools": True}, ("", "", [ToolCall("f", {})], None)),
        ("css\n{ color: red }", {"tools": True}, ("", "css\n{ color: red }", [], None)),
        ("f" * 65 + "\n{}", {"tools": True}, ("", "f" * 65 + "\n{}", [], None)),
        ("f\n{}<|assistant|>", {"tools": True}, ("", "", [ToolCall("f", {})], None)),
        ("f\n" + '{"a":' * 3000, {"tools": True}, ("", "f\n" + '{"a":' * 3000, [], None)),
        ("f\n" + '{"a":' * 3000 + "1" + "}" * 3000, {"tools": True}, None),
        # Rumination's form
        ('{"name": "open", "arguments": {"url": "x"}}', {"tools": True},
         ("", "", [ToolCall("open", {"url": "x"})], None)),
        ('</think>\n\n{"name" : "finish", "arguments": {}}', {"tools": True, "thinking": True},
         ("", "", [ToolCall("finish", {})], None)),
        ('{"name": "open"}', {"tools": True}, ("", '{"name": "open"}', [], None)),
        ('{"name": 3, "arguments": {}}', {"tools": True}, ("", '{"name": 3, "arguments": {}}', [], None)),
        ('{"nam": 1}', {"tools": True}, ("", '{"nam": 1}', [], None)),
        ('{"name": "f", "arguments": {}}', {}, ("", '{"name": "f", "arguments": {}}', [], None)),
        # stop strings
        ("a END b", {"stop_strings": ["END"]}, ("", "a ", [], "END")),
        ("\na\nb", {"stop_strings": ["\n"]}, ("", "a", [], "\n")),
        ("\na", {"stop_strings": ["\n"], "thinking": False}, ("", "", [], "\n")),
        ("<think>END</think>\nEN", {"stop_strings": ["END"]}, ("END", "EN", [], None)),
        ("<think>END</think>a END", {"stop_strings": ["END"]}, ("END", "a ", [], "END")),
        ("EN</think>D", {"stop_strings": ["END"], "thinking": True}, ("EN", "D", [], None)),
        (CALL, {"tools": True, "stop_strings": ["\n", "北"]}, ("", "", [CALLED], None)),
        (f"{CALL}!", {"tools": True, "stop_strings": ["北"]}, ("", 'weather\n{"city": "', [], "北")),
        (f"a<|assistant|>b {CALL}", {"tools": True, "stop_strings": ["a\nb"]}, ("", "", [], "a\nb")),
        (f"{CALL}<|assistant|>x STOP<|assistant|>{CALL}", {"tools": True, "stop_strings": ["STOP"]},
         ("", "x ", [CALLED], "STOP")),
    ],
)  # fmt: skip
def test_answers(text: str, options: Any, expected: Whole | None) -> None:
    as_tokens, as_bytes = read(TOKENIZER.encode(text), **options), read(spelled(text), **options)
    assert as_tokens == as_bytes
    if expected is not None:
        assert as_tokens == expected
    # where the marks are special tokens, the decoder leaves them out
    if options.get("thinking", "auto") is not False:
        assert read(SPECIAL.encode(text), SPECIAL, **options) == as_tokens


WORDS = st.text(alphabet='ab你😀 \n{}"', max_size=6)
PARTS = st.one_of(
    WORDS,
    st.sampled_from(["<think>", "</think>", "<|assistant|>", "f\n{}", CALL, CALL[:-3], "</thi", "<", "END", "E", "EN"]),
    st.just('{"name": "f", "arguments": {"a": "}"}}'),
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)
STOPS = st.lists(st.sampled_from(["END", "EN", "\n", "你", "a<", "D b", '"}', "😀"]), max_size=2)


def random_split(raw: RawTokenizer, text: str, random: np.random.Generator) -> list[int]:
    """Tokens of random slices of the text, some of the slices byte by byte."""
    tokens: list[int] = []
    separator = cast(int, TOKENIZER.token_id("<|assistant|>"))
    for i, turn in enumerate(text.split("<|assistant|>")):
        tokens += [separator] * bool(i)
        cuts = sorted({0, len(turn), *random.integers(0, len(turn) + 1, size=3).tolist()})
        for start, end in pairwise(cuts):
            piece = turn[start:end]
            tokens += spelled(piece) if random.random() < 0.5 else TOKENIZER.encode(piece)
    return tokens


@settings(deadline=None, max_examples=200)
@given(TEXTS, STOPS, st.sampled_from(["auto", True, False]), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_split_gives_the_same(text: str, stops: list[str], thinking: Any, tools: bool, seed: int) -> None:
    options = {"stop_strings": stops, "thinking": thinking, "tools": tools}
    whole = read(TOKENIZER.encode(text), **options)
    assert read(spelled(text), **options) == whole
    random = np.random.default_rng(seed)
    for _ in range(3):
        assert read(random_split(make_raw(), text, random), **options) == whole
    # Nothing is lost but what is meant to be: the marks, a stop with what follows, and whitespace.
    thought, content, calls, stopped = whole
    if stopped is None:
        kept = len("".join((thought + content).split())) + sum(len(json.dumps(c.arguments)) for c in calls)
        assert kept <= len("".join(text.split())) + 200
    else:
        assert stopped in stops and not any(stop in content for stop in stops)
    if not tools:
        assert calls == []


def test_a_call_is_one_delta_and_words_flow() -> None:
    pieces, parser = deltas(spelled(f"\n我查一下。<|assistant|>{CALL}<|assistant|>f\n{{}}"), tools=True)
    with_calls = [(i, piece) for i, piece in enumerate(pieces) if piece.tool_calls]
    assert [piece.tool_calls for _, piece in with_calls] == [(CALLED,), (ToolCall("f", {}),)]
    assert with_calls[0][0] == len(spelled(f"\n我查一下。<|assistant|>{CALL}<|assistant|>")) - 1  # the token behind it
    assert parser.finish_reason == "tool_calls"
    pieces, parser = deltas(spelled("ab, cd"), tools=True)
    assert [piece.content for piece in pieces] == ["", "", "ab,", " ", "c", "d", ""]
    assert parser.finish_reason == "stop"


def test_a_cut_call_is_content_and_no_tool_calls() -> None:
    for reason in ("length", "stop"):
        pieces, parser = deltas(spelled(CALL[:-2]), tools=True, reason=reason)
        assert pieces[-1] == AnswerDelta(content=CALL[:-2]) and parser.finish_reason == reason
    _, parser = deltas(spelled(f"{CALL}<|assistant|>f\n{{"), tools=True, reason="length")
    assert parser.finish_reason == "length"


def test_a_stop_string_behind_a_call_leaves_it_a_call() -> None:
    """OpenAI's: tool_calls where the model called a tool. Who asked would wait for nothing where it were a stop."""
    pieces, parser = deltas(spelled(f"{CALL}<|assistant|>so STOP"), tools=True, stop_strings=["STOP"])
    assert [call for piece in pieces for call in piece.tool_calls] == [CALLED]
    assert "".join(piece.content for piece in pieces) == "so " and parser.stopped == "STOP"
    assert parser.finish_reason == "tool_calls"
    _, parser = deltas(spelled(f"{CALL}<|assistant|>so"), tools=True, stop_strings=["STOP"], reason="length")
    assert parser.finish_reason == "length"


def test_half_characters() -> None:
    assert read(spelled("你")[:2]) == ("", "\ufffd", [], None)
    half = [*spelled("<think>你")[:-1], *spelled("</think>好")]
    assert read(half) == ("\ufffd", "好", [], None)
    separator = cast(int, TOKENIZER.token_id("<|assistant|>"))
    assert read([*spelled("你")[:1], separator, *spelled("好")]) == ("", "\ufffd\n好", [], None)
    assert read([*spelled("你")[:1], separator, *spelled("好")], thinking=False) == ("", "\ufffd好", [], None)


def test_after_the_end() -> None:
    parser = AnswerParser(TOKENIZER, stop_strings=["."])
    assert [parser.push(token) for token in spelled("a.b")] == [AnswerDelta(content="a"), AnswerDelta(), AnswerDelta()]
    assert parser.finish("stop") == AnswerDelta() and parser.stopped == "."
    parser = AnswerParser(TOKENIZER, stop_strings=["ab"])
    parser.push(spelled("a")[0])
    assert parser.finish("length") == AnswerDelta(content="a")
    assert parser.finish("stop") == AnswerDelta()
    with pytest.raises(UserError, match="token id"):
        AnswerParser(TOKENIZER).push(-1)
    assert AnswerParser(TOKENIZER).push(10**6) == AnswerDelta()


def test_long_answers_take_linear_time() -> None:
    """A call of 20,000 characters, blanks for ever, and an unclosed brace."""
    for text in ('f\n{"a": "' + "x{" * 10_000 + '"}', " " * 5_000, "f\n{" + '"a' * 10_000):
        read(TOKENIZER.encode(text), tools=True)
