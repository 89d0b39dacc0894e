"""``load(..., invariant=True)``: the same bits for every lookup and however a prompt is split, on any CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4export import cli
from glm4export.sources.checkpoint import locate
from glm4runtime import SamplingParams, Session, UserError, load
from glm4runtime.backends.invariance import find_granule, make_invariant
from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.contract import CacheSpec
from glm4runtime.speculation import MAX_DRAFT
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.kernels import KERNELS

TEXT = locate(None).folder / "heldout.txt"
REPEATING = "the whale and the sea and the whale and the sea and the whale and"
CHUNK = 32


@pytest.fixture(scope="module", params=KERNELS)
def session(request: pytest.FixtureRequest, kernel_bundles: Callable[[str], Path]) -> Session:
    """The embedded model, invariant."""
    bundle = kernel_bundles(request.param)
    sizes = {"max_seq_len": 231, "prefill_chunk": CHUNK}
    if find_granule(load(bundle, provider="cpu", **sizes).runner) is None:
        pytest.skip("this machine's kernels have no granule")
    return load(bundle, provider="cpu", invariant=True, **sizes)


@dataclass
class Outcome:
    """What a generation gave; two are equal where all bits are."""

    tokens: list[int]
    rows: list[bytes]  # the logits that each token, and a stop token, was chosen from
    finish_reason: str | None
    cache: list[bytes]


def outcome(session: Session, prompt: Sequence[int], params: SamplingParams, lookup: int) -> Outcome:
    generation = session.generate(prompt, params, lookup=lookup)
    tokens, rows = [], []
    for token in generation:
        tokens.append(token)
        rows.append(generation._logits.tobytes())
        assert session.runner.length == len(prompt) + len(tokens) - 1  # never ahead of what was read
    if generation.stop_token is not None:
        rows.append(generation._logits.tobytes())
    counts = generation.lookup
    assert counts.runs + counts.accepted == session.runner.length - len(prompt)
    assert counts.accepted <= counts.drafted <= lookup * counts.runs
    return Outcome(tokens, rows, generation.finish_reason, session.runner.cache_bits(session.runner.length))


def prefilled(runner: Runner, parts: Sequence[Sequence[int]]) -> tuple[bytes, list[bytes]]:
    """The last token's logits and the cache of a prompt given in parts."""
    runner.rewind()
    for part in parts:
        row = runner.prefill(part)
    return row.tobytes(), runner.cache_bits(runner.length)


def test_a_granule_is_found_here(session: Session) -> None:
    """The law: multiples of it agree. Which number it is, the machine says; 2 on all that were seen."""
    assert session.runner.granule in (1, 2, 4, 8)
    assert session.runner.max_seq_len == 231 - 231 % session.runner.granule


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_same_bits_for_every_lookup(temperature: float, session: Session) -> None:
    prompt = session.tokenizer.encode(REPEATING)
    params = SamplingParams(max_new_tokens=150, temperature=temperature, seed=11)
    wanted = outcome(session, prompt, params, 0)
    for lookup in (1, 2, 7, 8, MAX_DRAFT):
        assert outcome(session, prompt, params, lookup) == wanted


def test_same_bits_at_the_end_of_the_cache(session: Session) -> None:
    """Prompts of all lengths that leave few rows, of which the last has none behind it."""
    room = session.runner.max_seq_len
    text = session.tokenizer.encode(REPEATING * 20)
    for left in range(6):
        prompt = text[: room - left]
        wanted = outcome(session, prompt, SamplingParams(), 0)
        assert wanted.finish_reason == "length" or len(wanted.rows) > len(wanted.tokens)
        assert outcome(session, prompt, SamplingParams(), 7) == wanted


def test_same_bits_in_random_runs(session: Session) -> None:
    """Drafts of random widths, of which a random part is right and the rest is junk."""
    runner, ids = session.runner, session.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    for length in (5, 130):
        tokens, found = ids[length : length + 40], []
        for seed in range(4):
            rng, rows = np.random.default_rng(seed), []
            prefilled(runner, [ids[:length]])
            while len(rows) < len(tokens):
                width = int(rng.integers(1, MAX_RUN + 1)) if seed else 1
                run = tokens[len(rows) :][: int(rng.integers(1, width + 1))]
                junk = rng.integers(0, 13, width - len(run)).tolist()
                rows.extend(row.tobytes() for row in runner.verify([*run, *junk])[: len(run)])
                for _ in run:
                    runner.accept()
            found.append((rows, runner.cache_bits(runner.length)))
        assert all(one == found[0] for one in found)


def test_same_bits_however_a_prompt_is_split(session: Session) -> None:
    """Also from one token on, and whatever was in the cache before."""
    text = session.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 101, 128, session.runner.max_seq_len):
        ids = text[:length]
        wanted = prefilled(session.runner, [ids])
        for _ in range(4):
            cuts = sorted({0, length, *rng.integers(0, length, 3).tolist()})
            assert prefilled(session.runner, [ids[a:b] for a, b in pairwise(cuts)]) == wanted


@pytest.mark.parametrize("session", [name for name in KERNELS if "int8 cache" not in name], indirect=True)
def test_same_bits_for_every_prefill_chunk(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = session.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:129]
    wanted = prefilled(session.runner, [ids])
    for chunk in (2, 3, 5, 16, 31):
        if chunk >= session.runner.granule:
            monkeypatch.setattr(session.runner, "prefill_chunk", chunk)
            assert prefilled(session.runner, [ids]) == wanted


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    times=st.integers(1, 4),
    noise=st.lists(st.integers(2, 12), max_size=3),
    lookup=st.integers(0, MAX_DRAFT),
    limit=st.integers(1, 45),
    room=st.integers(12, 32),
    temperature=st.sampled_from([0.0, 0.4, 2.0]),
    cut=st.integers(0, 28),
)
def test_random_texts(
    pattern: list[int],
    times: int,
    noise: list[int],
    lookup: int,
    limit: int,
    room: int,
    temperature: float,
    cut: int,
    random_session: Session,
) -> None:
    session, prompt = random_session, [*pattern * times, *noise, *pattern]  # 28 tokens at most
    granule = session.runner.granule
    session.runner.max_seq_len = max(2 * room, -(-len(prompt) // granule) * granule) // granule * granule
    params = SamplingParams(temperature=temperature, seed=limit, max_new_tokens=limit)
    wanted = outcome(session, prompt, params, 0)
    assert outcome(session, prompt, params, lookup) == wanted
    parts = [part for part in (prompt[:cut], prompt[cut:]) if part]
    assert prefilled(session.runner, parts) == prefilled(session.runner, [prompt])


@pytest.fixture(scope="module")
def random_session(build_bundle: Build) -> Session:
    """A random model of few tokens, whose texts repeat themselves soon."""
    model = checkpoints.random_model(eos_token_id=[1], num_key_value_heads=1, vocab_size=13)
    return load(build_bundle(model, precision="int8", target="cpu"), invariant=True)


# The measurement itself, on runners that have laws of their own


class LawfulRunner(Runner):
    """Logits that tell the width of their run where a law says that it shows."""

    def __init__(self, shows: Any, room: int = 256, chunk: int = 64, cache: str = "float32") -> None:
        spec = CacheSpec(layers=1, kv_heads=1, head_dim=2, dtype=cache, max_seq_len=room)
        manifest: Any = type("Manifest", (), {"cache": spec, "vocab_size": 8})
        super().__init__(manifest, max_seq_len=None, prefill_chunk=chunk)
        self.shows, self.widths = shows, []

    def _rows(self, count: int) -> np.ndarray:
        self.widths.append(count)
        return np.array([[float(row)] if not self.shows(row, count) else [count + 0.5] for row in range(count)])

    def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
        assert not padding or start == 0
        return self._rows(len(ids))[-1] * 0 + (self.shows(len(ids) - 1, len(ids)) and len(ids))

    def _run_token(self, token: int, start: int) -> np.ndarray:
        return self._rows(1)[0]

    def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
        assert start + len(tokens) <= self.max_seq_len
        return self._rows(len(tokens))


LAWS: dict[str, tuple[Any, int | None]] = {
    "no width shows": (lambda row, count: False, 1),
    "a lone row": (lambda row, count: count == 1, 2),
    "the last row of an odd run": (lambda row, count: count % 2 and row == count - 1, 2),
    "rows behind the last four": (lambda row, count: row >= count - count % 4, 4),
    "rows behind the last eight": (lambda row, count: row >= count - count % 8, 8),
    "every width": (lambda row, count: True, None),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("room", [256, 40, 17])
def test_the_granule_is_what_the_law_says(law: str, room: int) -> None:
    shows, granule = LAWS[law]
    runner = LawfulRunner(shows, room)
    assert find_granule(runner) == granule
    assert runner.length == 0
    if granule is None:
        with pytest.raises(UserError, match=r"the bits .* \(tried 1, 2, 4, 8\); load without invariant"):
            make_invariant(runner)
        assert runner.granule == 1
        return
    make_invariant(runner)
    assert (runner.granule, runner.max_seq_len) == (granule, room - room % granule)
    runner.widths.clear()
    for length in range(1, runner.max_seq_len + 1):
        runner.rewind()
        runner.prefill([1] * length)
        while runner.length < runner.max_seq_len:
            runner.verify([2] * min(3, runner.max_seq_len - runner.length))
            runner.accept()
            if runner.length < runner.max_seq_len:
                runner.decode(3)
    assert {width % granule for width in runner.widths} == {0}


@pytest.mark.parametrize("phase", ["steps", "chunks"])
def test_a_width_that_shows_in_the_cache_alone(phase: str) -> None:
    """As fp16 on a CPU without AVX512, where a lone row's logits are rounded to the same numbers."""

    class Runner(LawfulRunner):
        lone = False

        def rewind(self, length: int = 0) -> None:
            super().rewind(length)
            self.lone = False

        def cache_bits(self, rows: int) -> list[bytes]:
            return [bytes([self.lone])]

        def _run_prompt(self, ids: np.ndarray, start: int, padding: int) -> np.ndarray:
            self.lone |= phase == "chunks" and len(ids) == 1
            return super()._run_prompt(ids, start, padding)

        def _run_draft(self, tokens: Sequence[int], start: int) -> np.ndarray:
            self.lone = phase == "steps" and len(tokens) == 1
            return super()._run_draft(tokens, start)

    assert find_granule(Runner(lambda row, count: False)) == 2


def test_an_int8_cache_keeps_to_one_grid_of_chunks() -> None:
    """However a prompt of 37 is split, its last run is the one of a whole prompt, and no chunk begins off the grid."""
    runner = LawfulRunner(LAWS["a lone row"][0], chunk=16, cache="int8")
    make_invariant(runner)
    for parts in ([37], [1, 36], [16, 21], [20, 1, 16]):
        runner.rewind()
        for part in parts:
            runner.widths.clear()
            runner.prefill([1] * part)
        assert runner.widths[-1] == 6  # from row 31: 32 to 36 and one in front
        assert set(runner.widths[:-1]) <= {16}


@pytest.mark.parametrize(
    ("room", "chunk", "message"),
    [(1, 1, "max_seq_len=1, but runs have multiples of 2"), (8, 1, "prefill_chunk=1, but runs have multiples of 2")],
)
def test_too_short_for_the_granule(room: int, chunk: int, message: str) -> None:
    runner = LawfulRunner(lambda row, count: count == 1, room, chunk)
    if room == 1:  # only lone rows ever run there, and they agree
        assert find_granule(runner) == 1
        return
    with pytest.raises(UserError, match=message):
        make_invariant(runner)


def test_command_line(demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(demo_bundles["fp32"]), "--raw", "--prompt", REPEATING, "--max-new-tokens", "60", "--json"]
    answers = []
    for extra in ([], ["--lookup", "7"]):
        assert cli.main([*argv, "--invariant", *extra]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["text"] == answers[1]["text"]
