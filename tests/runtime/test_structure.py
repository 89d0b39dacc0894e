"""Structures by llguidance on the embedded tokenizer: what walks under the masks, jsonschema and the parser accept."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest

from glm4runtime import Session, UserError
from glm4runtime.sampling import Sampler, SamplingParams
from glm4runtime.text.answers import ToolCall
from glm4runtime.text.assistant import AnswerParser
from glm4runtime.text.schema_limits import repetition
from glm4runtime.text.structure import (
    Matcher,
    Structure,
    StructureError,
    Vocabulary,
    compile_structure,
    fill_masks,
    tool_structure,
)
from glm4runtime.text.tokenizer import Tokenizer
from tests.helpers.demo import DEMO

TOKENIZER = Tokenizer.from_file(DEMO / "tokenizer.json")
STOP = [2036, 2043, 2045]
SIZE = 2100  # of a model whose logits are padded: the tokenizer has 2048
VOCABULARY = Vocabulary(TOKENIZER, SIZE, STOP)


def test_without_llguidance_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs llguidance; pip install '\.\[structured\]' in a clone of"):
        compile_structure(Structure(json_object=True), VOCABULARY)


def ids(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.mask.astype("<u4").view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]


def walk(matcher: Matcher, random: np.random.Generator, most: int = 600) -> list[int] | None:
    """Random allowed tokens to the end, which is taken where it may be; None where it takes too long."""
    tokens: list[int] = []
    for _ in range(most):
        fill_masks([matcher])
        allowed = ids(matcher)
        assert allowed and allowed[-1] < TOKENIZER.vocab_size
        ends = [i for i in allowed if i in STOP]
        # Short tokens now and then, or strings would be long ones of random words.
        short = [i for i in allowed if VOCABULARY.tokens[i] in (b'"', b"}", b"]", b"0")]
        pick = ends if ends and random.random() < 0.7 else short if short and random.random() < 0.4 else allowed
        token = int(random.choice(pick))
        matcher.consume(token)
        if token in STOP:
            return tokens
        tokens.append(token)
    return None


def parsed(tokens: list[int], **options: Any) -> tuple[str, str, list[ToolCall]]:
    parser = AnswerParser(TOKENIZER, **options)
    pieces = [parser.push(token) for token in tokens] + [parser.finish("stop")]
    calls = [call for piece in pieces for call in piece.tool_calls]
    return "".join(p.thought for p in pieces), "".join(p.content for p in pieces), calls


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F", "<|user|>", "北京", None]},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
            "at": {"type": "string", "format": "date"},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    {"anyOf": [{"const": {"a": [1, "<think>"]}}, {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5}]},
    {
        "$defs": {"n": {"type": "object", "properties": {"v": {"type": "integer", "multipleOf": 5},
                  "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                  "required": ["v", "next"], "additionalProperties": False}},
        "$ref": "#/$defs/n",
    },
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}, "additionalProperties": False},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
               {"properties": {"b": {"type": "string", "minLength": 1, "maxLength": 3}}, "required": ["b"]}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_walks_make_valid_documents(schema: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    made = compile_structure(Structure(json_schema=schema), VOCABULARY)
    whole = 0
    for _ in range(12):
        tokens = walk(made.copy(), random)
        if tokens is not None:
            content = parsed(tokens)[1]
            jsonschema.Draft202012Validator(schema).validate(json.loads(content))
            assert not re.search(r"[\n\t]|  [\"{\[]", re.sub(r'"(\\.|[^"\\])*"', '""', content))  # no blanks for ever
            whole += 1
    assert whole > 3


def test_other_structures() -> None:
    random = np.random.default_rng(1)
    for regex in (r"[0-9]{3}-[a-z]{2,4}", "(北京|上海)[!?]", "\n?x"):
        made = compile_structure(Structure(regex=regex), VOCABULARY)
        texts = [TOKENIZER.decode(walk(made.copy(), random) or [], skip_special_tokens=False) for _ in range(8)]
        assert all(re.fullmatch(regex, text) for text in texts)
    lark = 'start: "sum " term (" + " term)* <|assistant|>\nterm: /[0-9]{1,2}/ | "(" term ")"'
    tokens = walk(compile_structure(Structure(lark=lark), VOCABULARY), random)
    assert tokens is not None
    assert re.fullmatch(r"sum [0-9()]+( \+ [0-9()]+)*<\|assistant\|>", TOKENIZER.decode(tokens, False))
    tokens = walk(compile_structure(Structure(json_object=True), VOCABULARY), random)
    assert tokens is not None and isinstance(json.loads(TOKENIZER.decode(tokens)), dict)


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMAS[1]}},
    {"name": "get", "parameters": {"properties": {"n": {"type": "integer"}}, "additionalProperties": False}},
    {"type": "function", "function": {"name": "now"}},
]
VALIDATORS = {"get_weather": SCHEMAS[1], "get": TOOLS[1]["parameters"], "now": {"type": "object"}}


@pytest.mark.parametrize(
    "choice, parallel, names, most",
    [
        ("required", True, set(VALIDATORS), 99),
        ("required", False, set(VALIDATORS), 1),
        ({"type": "function", "function": {"name": "get"}}, True, {"get"}, 1),
    ],
)
def test_tool_calls_parse_back(choice: Any, parallel: bool, names: set[str], most: int) -> None:
    structure = tool_structure(TOOLS, choice, parallel)
    assert structure is not None
    random, counts = np.random.default_rng(2), []
    for thinking in (False, True):
        made = compile_structure(structure, VOCABULARY, thinking=thinking)
        for _ in range(10):
            matcher = made.copy()
            thought = TOKENIZER.encode("get\n{}</think>\n\n") if thinking else []
            for token in thought:
                matcher.consume(token)
            tokens = walk(matcher, random)
            if tokens is None:
                continue
            found = parsed(thought + tokens, thinking=thinking, tools=True)
            assert found[:2] == ("get\n{}" if thinking else "", "") and 1 <= len(found[2]) <= most
            for call in found[2]:
                assert call.name in names
                jsonschema.validate(call.arguments, VALIDATORS[call.name])
            counts.append(len(found[2]))
    assert len(counts) > 8 and (max(counts) > 1) == (most > 1)


def test_the_structure_begins_behind_the_thought() -> None:
    made = compile_structure(Structure(regex="[ab]"), VOCABULARY, thinking=True)
    fill_masks([made])
    free = ids(made)
    text = [i for i in range(2048) if not TOKENIZER.is_special(i)]
    assert free == text  # neither a special token, which would end it without an answer, nor padding
    spelled = [i for part in ("x", "</", "think", ">") for i in TOKENIZER.encode(part)]
    for thought in (TOKENIZER.encode("so ab</think>"), spelled):
        matcher = made.copy()
        for token in thought:
            fill_masks([matcher])
            assert token in ids(matcher) and not matcher.finished
            matcher.consume(token)
        fill_masks([matcher])
        assert {TOKENIZER.decode([i]) for i in ids(matcher)} - {"\n\n"} == {"a", "b", "\n"}
        matcher.consume(TOKENIZER.encode("\n")[0])
        fill_masks([matcher])
        assert {TOKENIZER.decode([i]) for i in ids(matcher)} == {"a", "b"}
        matcher.consume(TOKENIZER.encode("a")[0])
        assert matcher.finished
        fill_masks([matcher])
        assert set(ids(matcher)) == set(STOP)


def test_a_token_across_the_thoughts_end_holds_blanks_only() -> None:
    raw = [(i, token) for i, token in enumerate(VOCABULARY.tokens) if token[:1] == b">" and token[1:].strip()]
    made = compile_structure(Structure(regex="[ab]"), VOCABULARY, thinking=True)
    for part in ("</", "think"):
        for token in TOKENIZER.encode(part):
            made.consume(token)
    fill_masks([made])
    assert not {i for i, _ in raw} & set(ids(made))
    assert TOKENIZER.encode(">")[0] in ids(made)


def test_many_masks_at_once_and_one_that_fails() -> None:
    random = np.random.default_rng(3)
    structures = [Structure(json_schema=schema) for schema in SCHEMAS] + [Structure(regex="a+")]
    made = [compile_structure(s, VOCABULARY, thinking=i % 3 == 1) for i, s in enumerate(structures)]
    alone = [matcher.copy() for matcher in made]
    for _ in range(12):
        fill_masks(made)
        for one, other in zip(made, alone, strict=True):
            fill_masks([other])
            assert ids(one) == ids(other)
            token = int(random.choice([i for i in ids(one) if i not in STOP] or STOP[:1]))
            if not one.finished:
                one.consume(token)
                other.consume(token)
    with pytest.raises(StructureError, match=r"the token 2090 .*leaves the structure"):
        made[0].consume(2090)
    fill_masks(made)
    with pytest.raises(StructureError, match="can't be followed any more"):
        _ = made[0].mask
    fill_masks([alone[-1]])
    assert ids(made[-1]) == ids(alone[-1])
    fill_masks([])


def test_the_embedded_model_writes_a_document(demo_sessions: dict[str, Session]) -> None:
    session = demo_sessions["fp32"]
    vocabulary = Vocabulary(session.tokenizer, session.manifest.vocab_size, session.manifest.tokens.eos)
    prompt = session.tokenizer.encode(
        session.template.render([{"role": "user", "content": "Weather in Paris, as JSON?"}])
    )
    for seed in range(2):
        matcher = compile_structure(Structure(json_schema=SCHEMAS[1]), vocabulary)
        sampler = Sampler(SamplingParams(temperature=0.7 * seed, seed=seed), session.manifest.vocab_size)
        parser, content = AnswerParser(session.tokenizer), ""
        session.runner.resume([])
        logits = session.runner.prefill(prompt)
        for _ in range(300):
            fill_masks([matcher])
            bits = np.unpackbits(matcher.mask.astype("<u4").view(np.uint8), bitorder="little")[: logits.shape[-1]]
            token = sampler(np.where(bits, logits, np.float32(-1e9)).astype(np.float32))
            matcher.consume(token)
            if token in session.manifest.tokens.eos:
                break
            content += parser.push(token).content
            logits = session.runner.decode(token)
        content += parser.finish("stop").content
        jsonschema.validate(json.loads(content), SCHEMAS[1])


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, r'json_schema: can\'t be enforced: .*"not"'),
        ({"if": {}, "then": {}}, r'"if", "then"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "array", "contains": {}}, '"contains"'),
        ({"type": "string", "format": "zip"}, "Unknown format: zip"),
        ({"$ref": "https://example.org/x"}, "https://example.org/x"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "structure"),
        ({"type": "nonsense"}, "nonsense"),
    ],
)
def test_what_cannot_be_enforced(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        compile_structure(Structure(json_schema=schema), VOCABULARY)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "expected one of .*found none"),
        ({"regex": "a", "json_object": True}, "found json_object, regex"),
        ({"regex": ""}, "regex: expected text"),
        ({"lark": 3}, "lark: expected text, found 3"),
        ({"regex": "a" * 40_000}, "regex: .*at most 32768 bytes"),
        ({"regex": "(a{1000}){1000}"}, "regex: .*repetitions written out.*at most 20000 are taken, found 1000000"),
        ({"lark": "start: A\nA: /(a{1000}){1000}/"}, "lark: .*at most 20000"),
        ({"json_schema": True}, "json_schema: expected a JSON object, found bool"),
        ({"json_schema": {"x-guidance": {"lenient": True}}}, '"x-guidance" is not taken'),
        ({"json_schema": {"const": float("nan")}}, "not JSON"),
        ({"json_schema": {"const": {1, 2}}}, "not JSON"),
        ({"json_schema": nested(65)}, "nested more than 64 deep"),
        ({"json_schema": {"const": "a" * 300_000}}, "bytes: at most 262144"),
        ({"json_schema": {"properties": {str(i): {} for i in range(1001)}}}, '"properties".*at most 1000'),
        ({"json_schema": {"type": "integer", "multipleOf": 9_999_991}}, '"multipleOf".*at most 10000'),
        ({"json_schema": {"type": "number", "multipleOf": 1.2345678}}, '"multipleOf"'),
        ({"json_schema": {"items": {"pattern": "(a{999}){999}"}}}, '"pattern".*at most 20000'),
        ({"tools": []}, "at least one function"),
        ({"tools": [{"name": "a b"}]}, r"tools\[0\]: expected a function whose name"),
        ({"tools": [{"name": "a"}, {"name": "a"}]}, r"tools\[1\]: 'a' is there twice"),
        ({"tools": [{"name": "a", "parameters": {"type": "array"}}]}, 'parameters: expected "type": "object"'),
        ({"tools": [{"name": "a"}], "function": "b"}, "no function 'b'; they are a"),
        ({"json_object": True, "function": "b"}, "function='b' goes with tools"),
    ],
)  # fmt: skip
def test_structures_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        Structure(**given)


def test_regexes_and_grammars_that_are_none() -> None:
    for given, message in (({"regex": "(a"}, "regex: can't be enforced"), ({"lark": "start: nothing"}, "lark: can't")):
        with pytest.raises(StructureError, match=message):
            compile_structure(Structure(**given), VOCABULARY)


def test_a_schema_that_asks_for_nothing() -> None:
    """Any JSON: to be empty isn't to be absent."""
    structure = Structure(json_schema={})
    assert structure.kind == "json_schema"
    compile_structure(structure, VOCABULARY).consume(TOKENIZER.encode("1")[0])


def test_what_tool_choice_means() -> None:
    assert [tool_structure(TOOLS, free) for free in (None, "auto", "none")] == [None, None, None]
    for wrong in ("any", {"type": "function"}, {"function": {"name": "get"}}, 3):
        with pytest.raises(StructureError, match="tool_choice: expected"):
            tool_structure(TOOLS, wrong)
    with pytest.raises(StructureError, match="no function 'nothing'"):
        tool_structure(TOOLS, {"type": "function", "function": {"name": "nothing"}})


@pytest.mark.parametrize(
    "regex, size",
    [("abc", 3), ("(a|b)*c?", 3), ("))(", 2), ("a{3,}", 3), (r"\d{4}-\d{2}", 7), ("(ab{3}){5}", 20)],
)  # fmt: skip
def test_repetitions_written_out(regex: str, size: int) -> None:
    assert repetition(regex) == size
