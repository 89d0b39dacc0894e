from __future__ import annotations

from typing import Any

import pytest

from glm4runtime.engine.request import Delta
from glm4runtime.sampling.logprobs import TokenLogprobs
from tests.helpers.asgi import ask, events
from tests.helpers.fake_engine import FakeEngine, words
from tests.serve.conftest import Serve

PATH = "/v1/completions"


def scored(engine: FakeEngine, text: str) -> list[Delta]:
    """An answer with log-probabilities, its characters' halves apart."""
    decoder = engine.tokenizer.stream()
    deltas = [
        Delta(content=decoder.push(id), tokens=(id,), logprobs=(TokenLogprobs(id, -1.0, ((id + 1, -0.5),)),))
        for id in engine.tokenizer.encode(text)
    ]
    return [*deltas, Delta(finish_reason="stop")]


def test_offsets_and_tokens_with_the_prompt_s(serve: Serve) -> None:
    """Each token begins in the text where text_offset says, a character's second half where the character does."""
    app, engine = serve()
    app, engine = serve(scored(engine, " é is 🎉!"))
    prompt = "[gMASK]<sop>Oh é"
    choice = ask(app, PATH, {"prompt": prompt, "echo": True, "logprobs": 1}).json()["choices"][0]
    assert choice["text"] == prompt + " é is 🎉!"
    logprobs = choice["logprobs"]
    ids = [*engine.tokenizer.encode(prompt), *engine.tokenizer.encode(" é is 🎉!")]
    assert {len(values) for values in logprobs.values()} == {len(ids)}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    assert engine.requests[0].prompt_logprobs == 1
    for token, offset, following in zip(
        logprobs["tokens"], logprobs["text_offset"], [*logprobs["text_offset"][1:], len(choice["text"])], strict=True
    ):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:following] == token
    begun = len(engine.tokenizer.encode(prompt))
    assert logprobs["text_offset"][begun] == len(prompt)
    assert len(logprobs["top_logprobs"][begun]) == 2  # the token itself beside the best


def test_whole_and_streamed_are_the_same(serve: Serve) -> None:
    app, engine = serve()
    app, engine = serve(scored(engine, "a é b"))
    whole = ask(app, PATH, {"prompt": "x", "logprobs": 1}).json()["choices"][0]
    *chunks, done = events(ask(app, PATH, {"prompt": "x", "logprobs": 1, "stream": True}))
    assert done == "[DONE]" and "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"] == "a é b"
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    for key, values in whole["logprobs"].items():
        assert [value for part in parts for value in part[key]] == values


def test_several_prompts(serve: Serve) -> None:
    """Choices of the first come first; text and token ids; usage is of all."""
    app, engine = serve(words("!"))
    ids = [engine.tokenizer.encode(text) for text in ("ab", "c")]
    for prompt in (["ab", "c"], ids):
        answer = ask(app, PATH, {"prompt": prompt, "n": 2, "echo": True}).json()
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
            (0, "ab!"),
            (1, "ab!"),
            (2, "c!"),
            (3, "c!"),
        ]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids)) and answer["usage"]["completion_tokens"] == 4
    chunks = events(ask(app, PATH, {"prompt": ["ab", "c"], "stream": True, "echo": True}))[:-1]
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["ab!", "c!"]


def test_a_full_queue_refuses_all_prompts(serve: Serve) -> None:
    app, engine = serve(words("!"), pause=0.05, max_queue=1)
    response = ask(app, PATH, {"prompt": ["a", "b"]})
    assert response.status_code == 429 and response.headers["retry-after"] == "7"
    assert [feed.cancelled for feed in engine.feeds] == [True]


def test_no_tokens_but_the_prompt_s(serve: Serve) -> None:
    """As lm-evaluation-harness asks for loglikelihoods."""
    app, engine = serve()
    app, engine = serve(scored(engine, "x"))
    answer = ask(app, PATH, {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0}).json()
    choice = answer["choices"][0]
    assert choice["text"] == "ab" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(engine.tokenizer.encode("ab"))
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "a"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [["a"]]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"stream": True, "echo": True, "logprobs": 1}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_refusals(serve: Serve, change: dict[str, Any], param: str) -> None:
    app, engine = serve(words("x"))
    response = ask(app, PATH, {"prompt": "a", **change})
    assert response.status_code == 400 and param in response.json()["error"]["message"], response.text
    assert not engine.requests


def test_tokens_and_their_text(serve: Serve) -> None:
    app, engine = serve()
    text = "<|user|>\né 🎉"
    pieces = ask(app, "/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    ids = [piece["id"] for piece in pieces]
    assert ids == engine.tokenizer.encode(text) == ask(app, "/tokenize", {"content": text}).json()["tokens"]
    joined = b"".join(bytes(p) if isinstance(p, list) else p.encode() for p in (piece["piece"] for piece in pieces))
    assert joined.decode() == text == ask(app, "/detokenize", {"tokens": ids}).json()["content"]
    assert ask(app, "/detokenize", {"tokens": [-1]}).status_code == 400
