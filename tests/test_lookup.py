"""Prompt lookup gives the tokens of plain decoding, whatever is guessed and however much of it is right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4export import cli
from glm4export.checkpoint import locate
from glm4runtime import Generation, SamplingParams, Session, UserError, load
from glm4runtime.lookup import MAX_DRAFT, NgramIndex, PromptLookup
from glm4runtime.ort import MAX_RUN, OrtRunner
from glm4runtime.sampling import Sampler

from . import checkpoints
from .conftest import Build

PROMPTS: list[dict[str, Any]] = json.loads((locate(None).folder / "prompts.json").read_text(encoding="utf-8"))
REPEATING = "the whale and the sea and the whale and the sea and the whale and"
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa, odd sizes": {"num_key_value_heads": 1, "hidden_size": 72, "intermediate_size": 100, "vocab_size": 31},
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
    assert index.repeats == bool(naive_guess(tokens, 1))
    assert index.agreement(most) == naive_agreement(tokens, most)
    grown = NgramIndex(tokens[:10])
    for token in tokens[10:]:
        grown.push(token)
    assert grown.guess(count) == index.guess(count)


# The kernels: what the promise stands on


def cache_bytes(runner: OrtRunner) -> list[bytes]:
    """The cache's valid rows, every layer."""
    return [buffer.array[:, :, : runner.length].tobytes() for buffer in runner._cache._buffers.values()]


def run_in_groups(runner: OrtRunner, prompt: list[int], tokens: list[int], rng: np.random.Generator | None) -> Any:
    """Logits behind each token and the cache, the tokens run in random groups with junk behind; None: in pairs."""
    runner.rewind()
    runner.prefill(prompt)
    rows: list[np.ndarray] = []
    while len(rows) < len(tokens):
        width = 2 if rng is None else int(rng.integers(2, MAX_RUN + 1))
        kept = 1 if rng is None else int(rng.integers(1, width + 1))
        run = tokens[len(rows) : len(rows) + kept]
        junk = [7] * (width - len(run)) if rng is None else rng.integers(0, 13, width - len(run)).tolist()
        rows.extend(runner.verify([*run, *junk])[: len(run)].copy())
        for _ in run:
            runner.accept()
    return np.stack(rows), cache_bytes(runner)


def check_groups(runner: OrtRunner, prompt: list[int], tokens: list[int]) -> None:
    wanted, wanted_cache = run_in_groups(runner, prompt, tokens, None)
    for seed in range(3):
        rows, cache = run_in_groups(runner, prompt, tokens, np.random.default_rng(seed))
        assert np.array_equal(rows, wanted) and cache == wanted_cache
    runner.rewind()
    runner.prefill(prompt)
    alone = np.stack([runner.decode(token).copy() for token in tokens])
    assert np.abs(alone - wanted).max() < 0.5  # the same function, other rounding


def test_a_row_has_the_same_bits_in_every_run_of_two_or_more(demo: Session) -> None:
    text = demo.tokenizer.encode((locate(None).folder / "heldout.txt").read_text(encoding="utf-8"))
    for length in (5, 130, 380):
        check_groups(demo.runner, text[:length], text[length : length + 40])


@pytest.mark.parametrize("name", MODELS)
def test_the_same_in_random_geometries(name: str, sessions: dict[str, Session]) -> None:
    tokens = np.random.default_rng(3).integers(0, 13, 40).tolist()
    check_groups(sessions[name].runner, tokens[:6], tokens[6:30])


# Generation


@dataclasses.dataclass
class Outcome:
    tokens: list[int]
    rows: list[bytes]  # the logits that each token, and a stop token, was chosen from
    finish_reason: str | None
    stop_token: int | None
    length: int
    cache: list[bytes]


def outcome(session: Session, prompt: list[int], params: SamplingParams, lookup: int) -> Outcome:
    generation = session.generate(prompt, params, lookup=lookup)
    tokens, rows = [], []
    for token in generation:
        tokens.append(token)
        rows.append(generation._logits.tobytes())
        assert session.runner.length == len(prompt) + len(tokens) - 1  # never ahead of what was read
    if generation.stop_token is not None:
        rows.append(generation._logits.tobytes())
    assert generation.lookup.runs + generation.lookup.accepted == session.runner.length - len(prompt)
    assert generation.lookup.accepted <= generation.lookup.drafted <= lookup * generation.lookup.runs
    reason, stop = generation.finish_reason, generation.stop_token
    return Outcome(tokens, rows, reason, stop, session.runner.length, cache_bytes(session.runner))


def plain(session: Session, prompt: list[int], params: SamplingParams) -> Outcome:
    """Decoding without drafts, written out: a token runs alone, or beside a filler where its triple occurred before."""
    runner, sampler = session.runner, Sampler(params, session.manifest.vocab_size)
    runner.rewind()
    logits, text, rows, reason, stop = runner.prefill(prompt), list(prompt), [], "length", None
    while len(rows) < params.max_new_tokens:
        if rows:
            triple, end = text[-3:], runner.length
            if end == runner.max_seq_len:
                break
            if len(text) < 3 or triple not in (text[i : i + 3] for i in range(len(text) - 3)):
                logits = runner.decode(text[-1])
            elif end + 1 < runner.max_seq_len:
                logits = runner.verify([text[-1], 0])[0]
                runner.accept()
            else:
                logits = runner.verify(triple[1:], start=end - 1)[1]
                runner.accept()
        token = sampler(logits)
        rows.append(logits.tobytes())
        if token in session.manifest.tokens.eos:
            reason, stop = "stop", token
            break
        text.append(token)
    return Outcome(text[len(prompt) :], rows, reason, stop, runner.length, cache_bytes(runner))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    pattern=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    times=st.integers(1, 4),
    noise=st.lists(st.integers(2, 12), max_size=3),
    lookup=st.integers(0, MAX_DRAFT),
    limit=st.integers(1, 45),
    max_seq_len=st.integers(24, 64),
    temperature=st.sampled_from([0.0, 0.0, 0.4, 2.0]),
    seed=st.integers(0, 5),
)
def test_same_tokens_logits_cache_and_end_as_without_drafts(
    name: str,
    pattern: list[int],
    times: int,
    noise: list[int],
    lookup: int,
    limit: int,
    max_seq_len: int,
    temperature: float,
    seed: int,
    sessions: dict[str, Session],
) -> None:
    session = sessions[name]
    prompt = [*pattern * times, *noise, *pattern]  # 28 tokens at most
    params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=limit)
    # The cache's buffers keep their size; what ends a generation is this number.
    session.runner.max_seq_len = max(max_seq_len, len(prompt))
    wanted = plain(session, prompt, params)
    assert outcome(session, prompt, params, lookup) == wanted
    assert outcome(session, prompt, params, 0) == wanted


def test_guesses_are_accepted_and_save_runs(sessions: dict[str, Session]) -> None:
    counts = []
    for name, session in sessions.items():
        session.runner.max_seq_len = session.manifest.cache.max_seq_len
        generation = session.generate([5, 6, 7, 8] * 3, SamplingParams(max_new_tokens=50), lookup=MAX_DRAFT)
        list(generation)
        counts.append((name, generation.lookup.runs, generation.lookup.accepted))
    assert sum(accepted for _, _, accepted in counts) > sum(runs for _, runs, _ in counts)


@pytest.mark.parametrize(("steady", "lookup", "widths"), [(True, 0, {1, 2}), (False, 0, {1}), (False, 7, {1, 2, 4, 8})])
def test_how_many_tokens_a_run_has(
    steady: bool, lookup: int, widths: set[int], sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses are 1, 3 or 7, the more text agrees; without them, only a steady runner pairs a token with a filler."""
    session = sessions["gqa"]
    runner, seen = session.runner, set()
    runner.max_seq_len = session.manifest.cache.max_seq_len
    decode, verify = runner.decode, runner.verify
    monkeypatch.setattr(runner, "steady", steady)
    monkeypatch.setattr(runner, "decode", lambda token: (seen.add(1), decode(token))[1])
    monkeypatch.setattr(runner, "verify", lambda tokens, **start: (seen.add(len(tokens)), verify(tokens, **start))[1])
    runner.rewind()
    period = [5, 6, 7, 8, 9]
    runner.prefill(period)
    text = PromptLookup(runner, period, lookup)
    for token in period * 8:
        text.decode(token)
    assert seen == widths
    assert (text.accepted > 0) is (lookup > 0)


def test_listed_prompts_are_answered_the_same(demo: Session) -> None:
    for prompt in PROMPTS:
        plain_stream, stream = (
            demo.chat(prompt["messages"], tools=prompt.get("tools"), lookup=lookup) for lookup in (0, 7)
        )
        assert stream.read() == prompt["answer"]
        assert stream.stop_text == prompt["stop"] and stream.finish_reason == "stop"
        with pytest.raises(RuntimeError, match="another generation"):
            next(plain_stream)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_that_repeats_itself(temperature: float, demo: Session) -> None:
    prompt = demo.tokenizer.encode(REPEATING)
    params = SamplingParams(max_new_tokens=150, temperature=temperature, seed=11)
    wanted = plain(demo, prompt, params)
    for lookup in (0, 1, 7, 8, MAX_DRAFT):
        assert outcome(demo, prompt, params, lookup) == wanted
    generation = demo.generate(prompt, params, lookup=7)
    count = sum(1 for _ in generation)
    assert temperature or generation.lookup.runs < count / 2
    assert wanted.tokens == list(demo.generate(prompt, params))


# Mistakes


@pytest.mark.parametrize("lookup", [-1, MAX_DRAFT + 1, True, 2.0])
def test_lookup_out_of_range(lookup: Any, sessions: dict[str, Session]) -> None:
    with pytest.raises(UserError, match=rf"lookup: expected a whole number .* 0 to {MAX_DRAFT}, found {lookup!r}"):
        Generation(sessions["gqa"].runner, [5, 6], SamplingParams(), lookup=lookup)


def test_verify_and_accept_out_of_order(sessions: dict[str, Session]) -> None:
    runner = sessions["gqa"].runner
    runner.max_seq_len = 12
    runner.rewind()
    runner.prefill([5, 6, 7])
    with pytest.raises(ValueError, match="accept: no verified token is left"):
        runner.accept()
    with pytest.raises(ValueError, match=f"verify: {MAX_RUN + 1} tokens from 3"):
        runner.verify([5] * (MAX_RUN + 1))
    with pytest.raises(ValueError, match="verify: 1 tokens from 4"):
        runner.verify([5], start=4)
    with pytest.raises(UserError, match="no room for 10 tokens behind 3: it holds 12"):
        runner.verify([5] * 10)
    runner.verify([5, 6])
    runner.accept()
    runner.decode(6)
    with pytest.raises(ValueError, match="accept"):
        runner.accept()


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
