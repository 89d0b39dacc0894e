"""Numbers and texts of requests with several answers, where slots are few."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from glm4runtime import Request, SamplingParams
from glm4runtime.engine import RequestFailed
from tests.runtime.engine.conftest import LoadEngine


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 2000, length).tolist()


def test_answers_that_compute_their_prompt_again_count_it_once(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=1)
    params = SamplingParams(temperature=1, seed=1, max_new_tokens=3)
    one = engine.generate(Request(prompt(70), params=params, n=1, prompt_logprobs=1, salt="a")).result()
    three = engine.generate(Request(prompt(70), params=params, n=3, prompt_logprobs=1, salt="a")).result()
    assert three.prompt_logprobs == one.prompt_logprobs
    cold = engine.generate(Request(prompt(70), params=params, n=3, salt="b")).result()
    assert cold.usage.cached_tokens == 0  # what the second one finds is the first one's
    assert [choice.tokens for choice in cold.choices] == [choice.tokens for choice in three.choices]


def test_the_first_token_has_its_time_when_it_is_read(load_engine: LoadEngine) -> None:
    handle = load_engine().generate(Request(prompt(9)))
    next(handle)
    assert handle.timing.first_token is not None


def test_beams_leave_no_foreign_rows_in_the_store(load_engine: LoadEngine) -> None:
    ids, params = prompt(60, 3), SamplingParams(max_new_tokens=16)
    engine, plain = load_engine(prefix_cache="all"), load_engine(prefix_cache="off")
    beams = engine.generate(Request(ids, params=params, n=4, num_beams=4)).result()
    assert engine.stats().prefixes.blocks == 0  # a slot's rows at the end may be those of any beam
    for choice in beams.choices:
        again = Request([*ids, *choice.tokens, 5], params=SamplingParams(max_new_tokens=1), logprobs=5)
        found, wanted = (e.generate(again).result().choices[0].logprobs[0] for e in (engine, plain))
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert [token for token, _ in found.top] == [token for token, _ in wanted.top]


def test_a_stop_string_ends_a_beams_text(load_engine: LoadEngine) -> None:
    engine = load_engine()
    params = SamplingParams(max_new_tokens=12)
    whole = engine.generate(Request("The capital of France is", params=params, num_beams=2)).result().choices[0]
    word = whole.content.split()[1]
    cut = engine.generate(Request("The capital of France is", params=params, num_beams=2, stop=word)).result()
    choice = cut.choices[0]
    assert (choice.content, choice.finish_reason, choice.stop) == (whole.content.partition(word)[0], "stop", word)
    assert choice.tokens == whole.tokens[: len(choice.tokens)] != whole.tokens


def test_the_best_of_answers_that_time_cuts_off_has_a_text(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=1)
    params = SamplingParams(temperature=1, seed=1, max_new_tokens=190, min_new_tokens=190)
    handle = engine.submit(Request(prompt(9), params=params, best_of=3))
    while not handle.usage.completion_tokens:
        pass
    handle.cancel()
    assert handle.result().choices[0].tokens


def test_the_best_answer_is_that_with_the_most_probable_tokens_its_stop_included(load_engine: LoadEngine) -> None:
    engine = load_engine()
    params = SamplingParams(temperature=1.3, seed=30, max_new_tokens=40)
    stop = list(range(0, 2000, 7))
    every = engine.generate(Request(prompt(30), params=params, n=4, stop=stop)).result().choices
    assert {choice.finish_reason for choice in every} >= {"stop"}
    means = []
    for choice in every:
        tokens = [*choice.tokens, *([choice.stop] if isinstance(choice.stop, int) else [])]
        ids = [*prompt(30), *tokens]
        scores = engine.generate(Request(ids, params=SamplingParams(max_new_tokens=1), prompt_logprobs=0)).result()
        means.append(np.mean([scored.logprob for scored in scores.prompt_logprobs[30:]]))
    best = engine.generate(Request(prompt(30), params=params, best_of=4, stop=stop)).result().choices[0]
    assert best.tokens == every[int(np.argmax(means))].tokens


@pytest.mark.parametrize(
    "answers", [{"n": 1}, {"n": 3}, {"num_beams": 3}, {"n": 1, "best_of": 3}], ids=["one", "three", "beams", "best"]
)
def test_a_request_is_counted_once_whatever_it_ends_with(load_engine: LoadEngine, answers: dict[str, int]) -> None:
    engine = load_engine()
    drawn = {"temperature": 1.0, "seed": 3} if "num_beams" not in answers else {}
    used = engine.generate(
        Request(prompt(20), params=SamplingParams(max_new_tokens=8, **drawn), **answers)  # type: ignore[arg-type]
    ).result()
    engine.drain()
    stats = engine.stats()
    assert stats.prompt_tokens == used.usage.prompt_tokens == 20
    assert stats.completion_tokens == used.usage.completion_tokens > 0
    assert sum(stats.finished.values()) == max(answers.values())


def test_what_fails_is_counted_and_what_was_never_begun_is_not(
    load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, looks = load_engine(slots=1), (threading.Event(), threading.Event())
    right, steps = engine.runner.step, iter(looks)

    def step(*given: Any) -> np.ndarray:
        look = next(steps)
        look.wait(60)
        return right(*given) if look is looks[0] else 1 / 0

    monkeypatch.setattr(engine.runner, "step", step)
    long = SamplingParams(max_new_tokens=200, min_new_tokens=200)
    running, waiting = (engine.submit(Request(prompt(length), params=long)) for length in (20, 30))
    next(running)
    waiting.cancel()
    looks[0].set()
    assert waiting.result().usage.prompt_tokens == 30
    assert engine.stats().prompt_tokens == 0
    looks[1].set()
    with pytest.raises(RequestFailed):
        running.result()
    stats = engine.stats()
    assert stats.prompt_tokens == 20 and stats.completion_tokens == running.usage.completion_tokens > 0
    assert stats.finished == {"cancelled": 1, "error": 1}
