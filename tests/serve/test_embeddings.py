from __future__ import annotations

import asyncio
import base64
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4runtime import Encoder, load_encoder
from glm4serve import create_app
from glm4serve.embedder import Embedder, Embeddings
from glm4serve.errors import ApiError
from tests.helpers.asgi import CHAT, ask
from tests.helpers.checkpoints import save_with_tokenizer
from tests.helpers.encoders import random_encoder

PATH = "/v1/embeddings"


class Texts(list[str]):
    """A list that can be watched."""


@pytest.fixture(scope="module")
def encoder(build_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    """A random model's hidden states, pooled; its tokens are bytes."""
    checkpoint = save_with_tokenizer(random_encoder("features", vocab_size=256), tmp_path_factory.mktemp("features"))
    bundle = build_bundle(checkpoint, pooling="mean", target="cpu", precision="fp32")
    with load_encoder(bundle, max_seq_len=64) as opened:
        yield opened


def test_embeddings(encoder: Encoder) -> None:
    """Floats and base64 are the encoder's own numbers, for texts and token ids."""
    app = create_app({"e": encoder})
    texts = ["first text", "é"]
    ids = [encoder.tokenizer.encode_text(text)[0] for text in texts]
    wanted = encoder.embed(texts)
    for given in (texts, ids):
        answer = ask(app, PATH, {"input": given}).json()
        assert np.array_equal(np.array([item["embedding"] for item in answer["data"]], np.float32), wanted)
        assert answer["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    answer = ask(app, PATH, {"input": texts, "encoding_format": "base64"}).json()
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
    assert np.array_equal(rows, wanted)
    assert len(ask(app, PATH, {"input": "one"}).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[10**7]]}, "token id 10000000"),
        ({"input": "a " * 200}, "at most 64 fit"),
        ({"input": "a", "dimensions": 8}, "dimensions: unknown field"),
    ],
)
def test_refusals(encoder: Encoder, body: dict[str, Any], message: str) -> None:
    response = ask(create_app({"e": encoder}), PATH, body)
    assert response.status_code == 400 and message in response.json()["error"]["message"], response.text


def test_what_is_computed_for_nobody_still_has_its_place(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is kept of those who went away before it was their turn."""
    embedder, begun, go = Embedder("e", encoder, queue=1), threading.Event(), threading.Event()

    def compute(texts: object) -> Embeddings:
        begun.set()
        go.wait(30)
        return Embeddings(np.zeros((1, 1), np.float32), 1)

    monkeypatch.setattr(embedder, "compute", compute)

    async def leave() -> None:
        asked = asyncio.ensure_future(embedder.embed(["a"]))
        await asyncio.to_thread(begun.wait, 30)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert embedder.pending == 1
        waiting = asyncio.ensure_future(embedder.embed(texts := Texts(["b"])))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="the queue is full"):
            await embedder.embed(["c"])
        waiting.cancel()
        await asyncio.wait({waiting})
        held = weakref.ref(texts)
        del waiting, texts
        gc.collect()
        assert held() is None and embedder.pending == 1
        go.set()
        while embedder.pending:
            await asyncio.sleep(0.01)
        assert (await embedder.embed(["c"])).tokens == 1
        embedder.close()
        late = await asyncio.gather(*(embedder.embed(["d"]) for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in late] == [RuntimeError] * 2 and embedder.pending == 0

    asyncio.run(leave())


def test_a_model_of_the_other_kind(encoder: Encoder) -> None:
    response = ask(create_app({"e": encoder}), CHAT, {"model": "e", "messages": [{"role": "user", "content": "a"}]})
    assert response.status_code == 400 and "gives embeddings, no text" in response.json()["error"]["message"]
