"""The engine on the embedded model: requests in, deltas out, whatever happens in between."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4runtime import Engine, Request, SamplingParams, UserError, load
from glm4runtime.engine import Delta, EngineClosed, PromptTooLong, QueueFull, RequestFailed, Result
from tests.helpers.demo import DEMO, PROMPTS
from tests.runtime.engine.conftest import LoadEngine

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
LONG = SamplingParams(max_new_tokens=200, min_new_tokens=200)
LONG_BEAMS = SamplingParams(max_new_tokens=200)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 2000, length).tolist()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def whole(deltas: list[Delta]) -> Delta:
    joined = deltas[0]
    for delta in deltas[1:]:
        joined = joined.joined(delta)
    return joined


def test_an_answer_comes_in_deltas_that_join_to_the_result(load_engine: LoadEngine) -> None:
    handle = load_engine().generate(Request(messages=CAPITAL))
    deltas = list(handle)
    result = handle.result()
    assert len(deltas) > 3
    assert whole(deltas) == result.choices[0]
    assert result.choices[0].content == "The capital of France is Paris."
    assert result.choices[0].finish_reason == "stop"
    assert result.usage.completion_tokens == len(result.choices[0].tokens)
    assert 0 <= result.timing.started <= result.timing.first_token <= result.timing.finished


def test_an_event_loop_reads_several_at_once(load_engine: LoadEngine) -> None:
    engine = load_engine()

    async def read(request: Request) -> tuple[Delta, Result]:
        handle = engine.submit(request)
        return whole([delta async for delta in handle]), await handle.result_async()

    async def main() -> list[tuple[Delta, Result]]:
        return await asyncio.gather(*(read(Request(messages=p["messages"], tools=p.get("tools"))) for p in PROMPTS[:6]))

    for found, result in asyncio.run(main()):
        assert found == result.choices[0]
        assert found.content or found.tool_calls


def test_the_tokens_are_those_of_transformers(load_engine: LoadEngine) -> None:
    model = Glm4ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    engine = load_engine()
    handles = [engine.submit(Request(prompt(9 + 7 * i, i), params=SamplingParams(max_new_tokens=12))) for i in range(6)]
    for i, handle in enumerate(handles):
        ids = prompt(9 + 7 * i, i)
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(ids) :]
        found = handle.result().choices[0]
        assert list(found.tokens) == wanted.tolist()[: len(found.tokens)]
        assert len(found.tokens) == 12 or found.finish_reason == "stop"


def test_several_answers_share_a_prompt_and_have_seeds_of_their_own(load_engine: LoadEngine) -> None:
    engine = load_engine()
    params = SamplingParams(temperature=1.0, seed=5, max_new_tokens=20)
    three = engine.generate(Request(prompt(40), params=params, n=3)).result()
    alone = [
        engine.generate(Request(prompt(40), params=SamplingParams(temperature=1.0, seed=5 + i, max_new_tokens=20)))
        for i in range(3)
    ]
    assert [choice.tokens for choice in three.choices] == [handle.result().choices[0].tokens for handle in alone]
    assert three.usage.completion_tokens == sum(len(choice.tokens) for choice in three.choices)
    best = engine.generate(Request(prompt(40), params=params, n=1, best_of=3, logprobs=0)).result()
    means = [np.mean([t.logprob for t in choice.logprobs]) for choice in scored(engine, params).choices]
    assert best.choices[0].tokens == three.choices[int(np.argmax(means))].tokens
    assert best.choices[0].choice == 0


def test_answers_that_share_a_prompt_and_find_it_in_the_store(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=2)
    params = SamplingParams(temperature=1, seed=1, max_new_tokens=4, min_new_tokens=4)
    first, again = (engine.generate(Request(prompt(70), params=params, n=3)).result() for _ in range(2))
    assert first.choices == again.choices
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 64)


def scored(engine: Engine, params: SamplingParams) -> Result:
    return engine.generate(Request(prompt(40), params=params, n=3, logprobs=0)).result()


def test_more_answers_than_slots_wait_for_one(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=2)
    result = engine.generate(Request(prompt(20), params=SamplingParams(temperature=1, seed=1, max_new_tokens=8), n=5))
    assert len({choice.tokens for choice in result.result().choices}) == 5


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beams_are_those_of_transformers(load_engine: LoadEngine, penalty: float) -> None:
    model = Glm4ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    engine, ids = load_engine(), prompt(12, 3)
    settings = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": penalty, "do_sample": False}
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=10, pad_token_id=0, early_stopping=False, **settings)
    params = SamplingParams(max_new_tokens=10)
    result = engine.generate(Request(ids, params=params, n=3, num_beams=4, length_penalty=penalty)).result()
    for found, row in zip(result.choices, wanted[:, len(ids) :].tolist(), strict=True):
        assert list(found.tokens) == row[: len(found.tokens)]
    with pytest.raises(UserError, match="num_beams=8, and the engine has 4 slots"):
        engine.submit(Request(ids, num_beams=8))


def test_log_probabilities_are_the_models(load_engine: LoadEngine) -> None:
    model = Glm4ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = prompt(37)
    params = SamplingParams(max_new_tokens=5, temperature=0.7, seed=2)
    result = load_engine().generate(Request(ids, params=params, logprobs=3, prompt_logprobs=2)).result()
    choice = result.choices[0]
    with torch.no_grad():
        wanted = model(torch.tensor([[*ids, *choice.tokens]])).logits[0].log_softmax(-1).numpy()
    assert result.prompt_logprobs[0] is None
    for at, found in enumerate((*result.prompt_logprobs[1:], *choice.logprobs)):
        token = [*ids, *choice.tokens][at + 1]
        assert found.token == token
        assert found.logprob == pytest.approx(wanted[at, token], abs=1e-4)
        assert [i for i, _ in found.top] == np.argsort(-wanted[at])[: len(found.top)].tolist()
    assert len(choice.logprobs[0].top) == 3 and len(result.prompt_logprobs[1].top) == 2


def test_prompt_lookup_gives_the_tokens_of_an_invariant_session(load_engine: LoadEngine, demo_bundles: Any) -> None:
    ids = (prompt(11) * 6)[:60]
    params = SamplingParams(max_new_tokens=40)
    result = load_engine().generate(Request(ids, params=params, lookup=7)).result()
    with load(demo_bundles["fp32"], invariant=True, max_seq_len=256, prefill_chunk=32) as session:
        assert list(result.choices[0].tokens) == list(session.generate(ids, params, lookup=7))
    assert 0 < result.usage.accepted_tokens <= result.usage.drafted_tokens


def test_guesses_stay_within_what_a_run_takes_well(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(prefix_cache="off")
    runner, widths = engine.runner, []
    verify = runner.verify
    monkeypatch.setattr(runner, "verify", lambda *run: widths.append(len(run[1])) or verify(*run))
    request = Request((prompt(11) * 6)[:60], params=SamplingParams(max_new_tokens=40), lookup=15)
    engine.generate(request).result()
    assert max(widths) > 2
    widths.clear()
    monkeypatch.setattr(runner, "draft_rows", 2)
    engine.generate(request).result()
    assert max(widths) == 2


def test_a_next_turn_finds_the_prompt_of_the_last_one(load_engine: LoadEngine) -> None:
    engine = load_engine(prefix_cache_bytes=1 << 24)
    ids = prompt(130)
    first = engine.generate(Request(ids, logprobs=1)).result()
    again = engine.generate(Request(ids, logprobs=1)).result()
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 128)
    assert again.choices == first.choices
    other = engine.generate(Request(ids, logprobs=1, salt="another user")).result()
    assert other.usage.cached_tokens == 0 and other.choices == first.choices
    assert engine.stats().cached_tokens == 128


def test_prefixes_survive_a_restart(load_engine: LoadEngine, tmp_path: Path) -> None:
    ids = prompt(130)
    with load_engine() as engine:
        wanted = engine.generate(Request(ids, logprobs=1)).result()
        engine.save_prefixes(tmp_path / "prefixes")
    with load_engine() as engine:
        assert engine.restore_prefixes(tmp_path / "prefixes") > 0
        found = engine.generate(Request(ids, logprobs=1)).result()
        assert found.usage.cached_tokens == 128 and found.choices == wanted.choices
    other = load_engine("fp16")
    with pytest.raises(UserError, match="prefixes"):
        other.restore_prefixes(tmp_path / "prefixes")


def test_stops_end_content_across_tokens(load_engine: LoadEngine) -> None:
    result = load_engine().generate(Request(messages=CAPITAL, stop=["of France is"])).result()
    assert (result.choices[0].content, result.choices[0].stop) == ("The capital ", "of France is")
    assert result.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("length", [250, 256])
def test_the_caches_end_is_a_length(load_engine: LoadEngine, length: int) -> None:
    result = load_engine().generate(Request(prompt(length), params=LONG)).result()
    assert len(result.choices[0].tokens) == 256 - length + 1
    assert result.choices[0].finish_reason == "length"


def test_what_cannot_be_answered_is_said_at_once(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=1, max_queue=1)
    with pytest.raises(PromptTooLong, match="the prompt has 257 tokens, a slot holds 256"):
        engine.submit(Request(prompt(257)))
    longest = engine.tokenizer.longest
    with pytest.raises(PromptTooLong, match="the prompt has at least 256 tokens, a slot holds 256"):
        engine.submit(Request("a" * (256 * longest + 1)))  # before its tokens are looked for
    with pytest.raises(UserError, match="token"):
        engine.submit(Request([1, 999_999]))
    with pytest.raises(UserError, match="expected either prompt or messages, found neither"):
        Request()
    with pytest.raises(UserError, match=r"num_beams=3 goes with no params\.temperature"):
        Request([1], num_beams=3, params=SamplingParams(temperature=1))
    running = engine.submit(Request(prompt(5), params=LONG))
    wait_for(lambda: engine.stats().scheduler.running == 1)
    waiting = engine.submit(Request(prompt(5), params=LONG))
    with pytest.raises(QueueFull, match="the queue is full: 1 requests"):
        engine.submit(Request(prompt(5)))
    for handle in (running, waiting):
        handle.cancel()
        assert handle.result().choices[0].finish_reason == "cancelled"


def test_a_timeout_ends_an_answer_with_what_there_is(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=1)
    running = engine.submit(Request(prompt(5), params=LONG, timeout=0.15))
    waiting = engine.submit(Request(prompt(5), params=LONG, timeout=0.01))
    assert waiting.result().choices[0] == Delta(finish_reason="timeout")
    assert running.result().choices[0].finish_reason in ("timeout", "length")


def test_beams_that_are_cut_give_the_best_so_far(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    decode, handles = engine._worker.loop.decode, list[Any]()
    steps = iter(range(6))

    def cancelling(answers: Any) -> None:
        decode(answers)
        if next(steps, None) is None:
            handles[0].cancel()

    monkeypatch.setattr(engine._worker.loop, "decode", cancelling)
    request = Request(prompt(12, 3), params=SamplingParams(max_new_tokens=200), n=2, num_beams=4)
    with engine._worker.condition:  # so that no step comes before the handle is there
        handles.append(engine.submit(request))
    choices = handles[0].result().choices
    assert [choice.finish_reason for choice in choices] == ["cancelled"] * 2
    assert all(0 < len(choice.tokens) <= 8 for choice in choices) and choices[0].content
    assert choices[0].tokens != choices[1].tokens
    assert engine.stats().finished == {"cancelled": 4}
    monkeypatch.undo()
    late = engine.submit(Request(prompt(12, 3), params=LONG_BEAMS, num_beams=4, timeout=1e-6)).result()
    assert late.choices[0] == Delta(finish_reason="timeout")


def test_a_caller_who_goes_away_leaves_no_request(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=1)
    handle = engine.submit(Request(prompt(5), params=LONG))
    next(handle)
    del handle
    gc.collect()
    wait_for(lambda: engine.stats().scheduler.running == 0)
    assert engine.stats().finished == {"cancelled": 1}


def test_cancels_at_random_points_free_their_slots(load_engine: LoadEngine) -> None:
    engine, rng = load_engine(slots=3), np.random.default_rng(0)
    bystander = engine.submit(Request(prompt(20), params=LONG))
    for i in range(40):
        handle = engine.submit(Request(prompt(int(rng.integers(1, 250)), i), params=LONG))
        time.sleep(float(rng.uniform(0, 0.02)))
        if i % 2:
            threading.Thread(target=handle.cancel).start()
        else:
            handle.cancel()
        assert handle.result(30).choices[0].finish_reason in ("cancelled", "length")
    assert len(bystander.result().choices[0].tokens) == 200
    wait_for(lambda: engine.stats().scheduler.running == 0)


def failing(engine: Engine, name: str, wrong: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a method of the runner fail where ``wrong`` says so of its arguments."""
    right = getattr(engine.runner, name)

    def run(*arguments: Any) -> Any:
        if wrong(*arguments):
            raise RuntimeError("the graph failed")
        return right(*arguments)

    monkeypatch.setattr(engine.runner, name, run)


def test_a_failing_run_takes_down_whom_it_was_for(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    params = SamplingParams(max_new_tokens=20, min_new_tokens=20)
    wanted = engine.generate(Request(prompt(9), params=params)).result().choices
    failing(engine, "step", lambda slots, tokens, starts: 60 in starts, monkeypatch)
    bad, good = (engine.submit(Request(prompt(n), params=params)) for n in (50, 9))
    with pytest.raises(RequestFailed, match="the request failed: RuntimeError: the graph failed"):
        bad.result()
    assert good.result().choices == wanted
    assert engine.stats().healthy
    assert engine.stats().finished == {"length": 2, "error": 1}
    monkeypatch.undo()
    failing(engine, "prefill", lambda slot, tokens, start: True, monkeypatch)
    for _ in range(3):
        with pytest.raises(RequestFailed):
            engine.generate(Request(prompt(30), salt="new")).result()
    assert not engine.stats().healthy


def test_a_row_that_is_no_number_fails_alone(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    step = engine.runner.step

    def poisoned(slots: Any, tokens: Any, starts: Any) -> Any:
        rows = step(slots, tokens, starts)
        for row, start in zip(rows, starts, strict=True):
            if start == 55:
                row[:] = np.nan
        return rows

    monkeypatch.setattr(engine.runner, "step", poisoned)
    params = SamplingParams(max_new_tokens=20, min_new_tokens=20)
    bad, good = (engine.submit(Request(prompt(n), params=params)) for n in (50, 9))
    with pytest.raises(RequestFailed, match="finite maximum"):
        bad.result()
    assert good.result().choices[0].finish_reason == "length"


def test_a_dead_thread_leaves_nobody_waiting(load_engine: LoadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    monkeypatch.setattr(engine._worker.scheduler, "plan", lambda now: 1 / 0)
    with pytest.raises(RequestFailed, match="the engine's thread died: ZeroDivisionError"):
        engine.generate(Request(prompt(5))).result(30)
    wait_for(lambda: not engine._worker.thread.is_alive())
    assert not engine.stats().healthy
    with pytest.raises(EngineClosed, match="has died"):
        engine.submit(Request(prompt(5)))


def test_draining_answers_what_was_accepted(load_engine: LoadEngine) -> None:
    engine = load_engine(slots=2)
    handles = [engine.submit(Request(prompt(5, i), params=LONG)) for i in range(4)]
    assert not engine.drain(0)
    with pytest.raises(EngineClosed, match="takes no more requests"):
        engine.submit(Request(prompt(5)))
    assert engine.drain(60)
    assert all(len(handle.result().choices[0].tokens) == 200 for handle in handles)
    engine.close()
    engine.close()


def test_closing_cancels_what_is_under_way(load_engine: LoadEngine) -> None:
    engine = load_engine()
    handle = engine.submit(Request(prompt(5), params=LONG))
    next(handle)
    engine.close()
    assert handle.result().choices[0].finish_reason == "cancelled"
