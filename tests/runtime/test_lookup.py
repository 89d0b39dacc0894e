"""Prompt lookup: its index, the tokens it gives, and what an interrupt leaves of it. See test_invariance for bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4export import cli
from glm4export.sources.checkpoint import locate
from glm4runtime import Generation, SamplingParams, Session, UserError, load
from glm4runtime.backends.runner import MAX_RUN
from glm4runtime.lookup import NgramIndex, PromptLookup
from glm4runtime.speculation import MAX_DRAFT, Speculation
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.interrupts import Interrupt

PROMPTS: list[dict[str, Any]] = json.loads((locate(None).folder / "prompts.json").read_text(encoding="utf-8"))
REPEATING = "the whale and the sea and the whale and the sea and the whale and"
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa, odd sizes": {"num_key_value_heads": 1, "hidden_size": 72, "intermediate_size": 100, "vocab_size": 31},
    "one vocabulary": {"vocab_size": 13},
    "gelu, one layer": {"num_hidden_layers": 1, "hidden_act": "gelu", "vocab_size": 13, "head_dim": 16},
}
# Which weights a precision stores in which format is the build's matter; here every kernel of decoding gets its turn.
PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp32 with an int8 cache")


@pytest.fixture(scope="module")
def sessions(build_bundle: Build) -> dict[str, Session]:
    """Random models of few tokens, whose texts repeat themselves soon."""
    return {
        name: load(build_bundle(checkpoints.random_model(eos_token_id=[1], **sizes), precision="fp32", target="cpu"))
        for name, sizes in MODELS.items()
    }


@pytest.fixture(scope="module", params=PRECISIONS)
def demo(request: pytest.FixtureRequest, build_bundle: Build, demo_bundles: dict[str, Path]) -> Session:
    precision, *cache = request.param.split(" with an ")
    options = {"kv_cache": "int8", "calibrate": locate(None).folder / "heldout.txt"} if cache else {}
    bundle = demo_bundles.get(request.param) or build_bundle(None, precision=precision, target="cpu", **options)
    return load(bundle, max_seq_len=512)


# The index


def naive_guess(tokens: list[int], count: int) -> list[int]:
    """By definition: the longest suffix of 6 to 3 tokens that occurred before, its last occurrence, what followed."""
    for size in (6, 5, 4, 3):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return []


def naive_agreement(tokens: list[int], most: int) -> int:
    """How far back the text and its earlier occurrence are the same; the occurrence as :func:`naive_guess` finds it."""
    for size in (6, 5, 4, 3):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                end = start + size
                return max(n for n in range(min(most, end) + 1) if not n or tokens[end - n : end] == tokens[-n:])
    return 0


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.integers(0, 20))
def test_index_finds_the_last_occurrence_of_the_longest_ngram(tokens: list[int], count: int, most: int) -> None:
    index = NgramIndex(tokens)
    assert index.guess(count) == naive_guess(tokens, count)
    assert index.agreement(most) == naive_agreement(tokens, most)
    grown = NgramIndex(tokens[:10])
    for token in tokens[10:]:
        grown.push(token)
    assert grown.guess(count) == index.guess(count)


# Generation


@pytest.mark.parametrize(("lookup", "widths"), [(0, {1}), (1, {1, 2}), (7, {1, 2, 4, 8})])
def test_how_many_tokens_a_run_has(
    lookup: int, widths: set[int], sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses are 1, 3 or 7, the more text agrees; a token without guesses runs alone."""
    runner, seen = sessions["gqa"].runner, set()
    decode, verify = runner.decode, runner.verify
    monkeypatch.setattr(runner, "decode", lambda token: (seen.add(1), decode(token))[1])
    monkeypatch.setattr(runner, "verify", lambda tokens: (seen.add(len(tokens)), verify(tokens))[1])
    runner.rewind()
    period = [5, 6, 7, 8, 9]
    runner.prefill(period)
    text = Speculation(runner, PromptLookup(period, lookup))
    for token in period * 8:
        text.decode(token)
    assert seen == widths
    assert (text.counts.accepted > 0) is (lookup > 0)
    assert text.counts.runs + text.counts.accepted == 40


def test_guesses_are_accepted_and_save_runs(sessions: dict[str, Session]) -> None:
    counts = []
    for session in sessions.values():
        generation = session.generate([5, 6, 7, 8] * 3, SamplingParams(max_new_tokens=50), lookup=MAX_DRAFT)
        list(generation)
        counts.append(generation.lookup)
    assert sum(count.accepted for count in counts) > sum(count.runs for count in counts)


def test_listed_prompts_are_answered_the_same(demo: Session) -> None:
    for prompt in PROMPTS:
        plain_stream, stream = (
            demo.chat(prompt["messages"], tools=prompt.get("tools"), lookup=lookup) for lookup in (0, 7)
        )
        assert stream.read() == prompt["answer"]
        assert stream.stop_text == prompt["stop"] and stream.finish_reason == "stop"
        with pytest.raises(RuntimeError, match="another generation"):
            next(plain_stream)


# Interrupts


def read_interrupted(session: Session, prompt: list[int], params: SamplingParams, lookup: int, at: int) -> list[int]:
    """The tokens of a generation whose reads are interrupted once, at line ``at`` of the runtime's code."""
    generation, tokens = session.generate(prompt, params, lookup=lookup), []
    with Interrupt(at) as interrupt:
        while generation.finish_reason is None:
            try:
                tokens.extend([token] if (token := next(generation, None)) is not None else [])
            except KeyboardInterrupt:
                continue
    assert interrupt.lines >= at, "the generation was over before"
    assert generation.completion_tokens == len(tokens)
    assert generation.lookup.runs + generation.lookup.accepted == session.runner.length - len(prompt)
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("lookup", [0, 7])
@pytest.mark.parametrize("kind", ["graphs", "step"])
def test_an_interrupted_read_changes_nothing(
    kind: str, lookup: int, temperature: float, interrupted: dict[str, Session]
) -> None:
    session = interrupted[kind]
    params = SamplingParams(temperature=temperature, seed=3, max_new_tokens=14)
    prompt = [5, 6, 7, 8, 5, 6, 7]
    wanted = list(session.generate(prompt, params, lookup=lookup))
    with Interrupt(0) as count:
        list(session.generate(prompt, params, lookup=lookup))
    every = max(1, count.lines // 150)
    for at in range(1, count.lines // 2, every):
        assert read_interrupted(session, prompt, params, lookup, at) == wanted


@pytest.fixture(scope="module")
def interrupted(build_bundle: Build) -> dict[str, Session]:
    """An invariant session on prefill and decode graphs, and one on a step graph, in fp32."""
    model = checkpoints.random_model(eos_token_id=[1], vocab_size=13)
    return {
        kind: load(build_bundle(model, precision="fp32", target=target), provider="cpu", invariant=True)
        for kind, target in (("graphs", "cpu"), ("step", "tensorrt"))
    }


# Mistakes


@pytest.mark.parametrize("lookup", [-1, MAX_DRAFT + 1, True, 2.0])
def test_lookup_out_of_range(lookup: Any, sessions: dict[str, Session]) -> None:
    with pytest.raises(UserError, match=rf"lookup: expected a whole number .* 0 to {MAX_DRAFT}, found {lookup!r}"):
        Generation(sessions["gqa"].runner, [5, 6], SamplingParams(), lookup=lookup)


def test_verify_and_accept_out_of_order(build_bundle: Build) -> None:
    bundle = build_bundle(checkpoints.random_model(vocab_size=13), precision="fp32", target="cpu")
    runner = load(bundle, max_seq_len=12).runner
    runner.prefill([5, 6, 7])
    with pytest.raises(ValueError, match="accept: no verified token is left"):
        runner.accept()
    with pytest.raises(ValueError, match=f"verify: {MAX_RUN + 1} tokens, expected 1 to {MAX_RUN}"):
        runner.verify([5] * (MAX_RUN + 1))
    with pytest.raises(UserError, match="no room for 10 tokens behind 3: it holds 12"):
        runner.verify([5] * 10)
    runner.verify([5, 6])
    runner.accept()
    runner.decode(6)
    with pytest.raises(ValueError, match="accept"):
        runner.accept()


BAD_IDS: list[tuple[Any, str]] = [
    ([5, -1], "token id -1 is not a whole number in 0..12"),
    ([5, 13], "token id 13 is not a whole number in 0..12"),
    ([5, 2**70], f"token id {2**70} is not a whole number in 0..12"),
    ([5, 6.0], "token id 6.0 is not a whole number"),
    ([5, float("nan")], "token id nan is not a whole number"),
    ([5, "6"], "token id '6' is not a whole number"),
    ([True, 5], "token id True is not a whole number"),
    ([5, None], "token id None is not a whole number"),
    ([[5, 6]], r"token id \[5, 6\] is not a whole number"),
    (np.array([5.0]), "token id 5.0|token id np.float64"),
    (np.array([[5, 6]]), r"token id array\(\[5, 6\]\) is not a whole number"),
    (np.array([5, 13]), "token id 13 is not a whole number"),
    (np.array([True]), "token id np.True_ is not a whole number"),
    (b"ab", "the prompt is b'ab', expected a sequence of token ids"),
    (7, "the prompt is 7, expected a sequence of token ids"),
    ({5, 6}, "the prompt is {5, 6}, expected a sequence"),
    ([], "the prompt is empty"),
    ([5] * 65, "the prompt needs 65 tokens, the cache holds 64"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_IDS, ids=lambda value: str(value)[:20])
def test_a_refused_prompt_does_not_end_the_generation_under_way(
    prompt: Any, message: str, build_bundle: Build, sessions: dict[str, Session]
) -> None:
    session = sessions["one vocabulary"]
    params = SamplingParams(max_new_tokens=12)
    wanted = list(session.generate([5, 6, 7], params))
    generation = session.generate([5, 6, 7], params)
    tokens = [next(generation) for _ in range(4)]
    with pytest.raises(UserError, match=message):
        session.generate(prompt, params)
    with pytest.raises(UserError, match="lookup: expected"):
        session.generate([5], params, lookup=99)
    assert [*tokens, *generation] == wanted
    assert list(session.generate(np.array([5, 6, 7], np.uint8), params)) == wanted


@pytest.mark.parametrize("token", [-1, 13, 5.0, "5", True])
def test_a_token_outside_the_vocabulary(token: Any, sessions: dict[str, Session]) -> None:
    runner = sessions["one vocabulary"].runner
    runner.rewind()
    runner.prefill([5])
    for run in (runner.decode, lambda token: runner.verify([6, token])):
        with pytest.raises(UserError, match=f"token id {token!r} is not a whole number in 0..12"):
            run(token)
        assert runner.length == 1


def test_command_line(demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(demo_bundles["fp32"]), "--raw", "--prompt", REPEATING, "--max-new-tokens", "60", "--json"]
    answers = []
    for extra in ([], ["--lookup", "7"]):
        assert cli.main([*argv, *extra]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["text"] == answers[1]["text"] and answers[0]["lookup"]["drafted"] == 0
    counts = answers[1]["lookup"]
    assert counts["runs"] + counts["accepted"] == answers[1]["completion_tokens"] - 1
    assert 0 < counts["accepted"] <= counts["drafted"]
    assert cli.main([*argv, "--lookup", "99"]) == 2
    assert "lookup: expected a whole number of draft tokens from 0 to 15, found 99" in capsys.readouterr().err
