"""Bundles without a cache at work: the numbers of transformers, in the order given, however texts are batched."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextClassificationPipeline, TokenClassificationPipeline

from glm4export import cli
from glm4runtime import Span, UserError, load, load_encoder
from glm4runtime.backends.prepare import prepare
from glm4runtime.contract import read_manifest
from glm4runtime.text.tokenizer import Tokenizer
from tests.conftest import Build
from tests.helpers.checkpoints import save_with_tokenizer
from tests.helpers.encoders import random_encoder

TEXTS = ["Paris is in France", "no", "A longer text, with commas, and Marie Curie in it.", "12 + 7 = 19", "x"]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}
VOCAB = 256


def built(build: Build, folder: Path, task: str, options: dict[str, Any] | None = None, **config: Any) -> Any:
    """A random model with a byte tokenizer, and its bundle."""
    model = random_encoder(task, vocab_size=VOCAB, **config)
    checkpoint = save_with_tokenizer(model, folder)
    return model, build(checkpoint, precision="fp32", target="cpu", **(options or {})), checkpoint


@pytest.fixture(scope="module")
def embedder(build_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = {"pooling": "mean", "normalize": True}
    return built(build_bundle, tmp_path_factory.mktemp("features"), "features", options)


@pytest.fixture(scope="module")
def classifier(build_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(build_bundle, tmp_path_factory.mktemp("sequence"), "sequence-classification")


@pytest.fixture(scope="module")
def tagger(build_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(build_bundle, tmp_path_factory.mktemp("tokens"), "token-classification", None, id2label=LABELS)


def pipeline(kind: Any, model: Any, checkpoint: Path, **options: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    return kind(model=model, tokenizer=tokenizer, device="cpu", **options)


def test_embeddings_of_texts_and_of_their_ids(embedder: Any) -> None:
    model, bundle, _ = embedder
    with load_encoder(bundle) as encoder:
        found = encoder.embed(TEXTS)
        for text, row in zip(TEXTS, found, strict=True):
            ids = encoder.tokenizer.encode(text)
            with torch.no_grad():
                mean = model(torch.tensor([ids]))[0][0].mean(0)
            assert np.abs(row - torch.nn.functional.normalize(mean, dim=0).numpy()).max() <= 2e-6
        assert found.dtype == np.float32 and found.shape == (len(TEXTS), 64)
        ids = [encoder.tokenizer.encode(text) for text in TEXTS]
        np.testing.assert_array_equal(encoder.embed(ids), found)
        assert encoder.embed([]).shape == (0, 64)


def test_batches_are_of_like_length_and_answers_in_the_order_given(embedder: Any, monkeypatch: Any) -> None:
    _, bundle, _ = embedder
    with load_encoder(bundle, batch_tokens=24) as encoder:
        shapes, run = [], encoder.runner.run
        monkeypatch.setattr(encoder.runner, "run", lambda ids, mask: (shapes.append(ids.shape), run(ids, mask))[1])
        done: list[int] = []
        texts = [[5] * length for length in (3, 20, 1, 8, 30, 8)]
        found = encoder.embed(texts, progress=done.append)
        assert shapes == [(1, 30), (1, 20), (3, 8), (1, 1)] and done == [1, 1, 3, 1]
        alone = [encoder.embed([text])[0] for text in texts]
        assert np.abs(found - np.stack(alone)).max() <= 2e-6


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_labels": 1},
        {"problem_type": "multi_label_classification", "id2label": {0: "a", 1: "b", 2: "c"}},
        {"problem_type": "regression", "num_labels": 1},
    ],
)
def test_labels_and_scores_are_those_of_transformers(
    config: dict[str, Any], build_bundle: Build, tmp_path: Path
) -> None:
    model, bundle, checkpoint = built(build_bundle, tmp_path, "sequence-classification", None, **config)
    with load_encoder(bundle) as encoder:
        found = encoder.classify(TEXTS)
    wanted = pipeline(TextClassificationPipeline, model, checkpoint, top_k=None)(TEXTS)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.label == theirs[0]["label"] and abs(ours.score - theirs[0]["score"]) < 1e-5
        assert ours.scores == pytest.approx({each["label"]: each["score"] for each in theirs}, abs=1e-5)


def test_spans_are_those_of_transformers(tagger: Any) -> None:
    model, bundle, checkpoint = tagger
    texts = [*TEXTS, "Zürich and 北京 are cities"]
    with load_encoder(bundle) as encoder:
        found = encoder.classify_tokens(texts)
    tag = pipeline(TokenClassificationPipeline, model, checkpoint, aggregation_strategy="simple")
    assert sum(map(len, found)) > 20
    for text, ours in zip(texts, found, strict=True):
        theirs = tag(text)
        assert [(span.label, span.start, span.end) for span in ours] == [
            (span["entity_group"], span["start"], span["end"]) for span in theirs
        ]
        assert [span.score for span in ours] == pytest.approx([span["score"] for span in theirs], abs=1e-5)
        assert all(text[span.start : span.end] == span.text for span in ours)


def test_what_tokenizer_json_puts_around_a_text(build_bundle: Build, tmp_path: Path) -> None:
    """As transformers' tokenizer does; the chat template of a generating bundle writes it itself."""
    model = random_encoder("token-classification", vocab_size=VOCAB)
    checkpoint = save_with_tokenizer(model, tmp_path)
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text())
    first = next(iter(data["model"]["vocab"]))
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [0], "tokens": [first]}},
    }
    path.write_text(json.dumps(data))
    with load_encoder(build_bundle(checkpoint, precision="fp32", target="cpu")) as encoder:
        ids, offsets = encoder.tokenizer.encode_text("ab")
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))("ab").input_ids
        assert ids == theirs and ids[0] == 0 and offsets == [None, (0, 1), (1, 2)]


def test_what_stands_behind_a_text_stays_where_the_text_is_cut(embedder: Any, tmp_path: Path) -> None:
    """An embedding by last pooling is that token's."""
    data = json.loads((embedder[1] / "tokenizer.json").read_text())
    last = next(iter(data["model"]["vocab"]))
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": last, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {last: {"id": last, "ids": [0], "tokens": [last]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with load_encoder(embedder[1], truncate=True, max_seq_len=4) as encoder:
        encoder.tokenizer = Tokenizer.from_bytes(json.dumps(data).encode(), "tokenizer.json", whole_texts=True)
        cut = theirs("abcdef", truncation=True, max_length=4).input_ids
        assert cut[-1] == 0 and encoder.tokenizer.encode_text("abcdef", 4) == (cut, [(0, 1), (1, 2), (2, 3), None])
        np.testing.assert_array_equal(encoder.embed(["abcdef"]), encoder.embed([cut]))
        assert len(encoder.tokenizer.encode_text("abcdef")[0]) == 7


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], "text 1 is empty; at least one token is needed"),
        (["a" * 65], r"text 0 has 65 tokens, at most 64 fit; shorten it, or open the bundle with truncate=True"),
        ([[1], [1, VOCAB]], "^text 1: token id 256 is not a whole number in 0..255"),
        ([5], "text 0 is 5, expected a sequence of token ids"),
        ("text", "texts is 'text', expected a list of texts"),
    ],
)
def test_texts_that_are_refused(texts: Any, message: str, embedder: Any) -> None:
    with load_encoder(embedder[1]) as encoder, pytest.raises(UserError, match=message):
        encoder.embed(texts)


def test_long_texts_are_cut_where_that_is_asked_for(embedder: Any) -> None:
    with load_encoder(embedder[1], truncate=True, max_seq_len=8) as encoder:
        np.testing.assert_array_equal(encoder.embed(["abcdefghij"]), encoder.embed(["abcdefgh"]))


def test_what_another_bundle_does(
    embedder: Any, classifier: Any, tagger: Any, demo_bundles: dict[str, Path], build_bundle: Build
) -> None:
    with pytest.raises(UserError, match=r"a bundle for features; open it with glm4runtime.load_encoder; .* `embed`"):
        load(embedder[1])
    with pytest.raises(UserError, match=r"a bundle for causal-lm; open it with glm4runtime.load; .* `generate` runs"):
        load_encoder(demo_bundles["fp32"])
    with load_encoder(classifier[1]) as encoder:
        for ask in (encoder.embed, encoder.hidden_states, encoder.classify_tokens):
            with pytest.raises(UserError, match=r"a bundle for sequence-classification; .* `classify` runs it"):
                ask(["a"])
    with (
        load_encoder(tagger[1]) as encoder,
        pytest.raises(UserError, match=r"text 0 is \[1, 2\]: spans are of characters"),
    ):
        encoder.classify_tokens([[1, 2]])  # type: ignore[list-item]
    with load_encoder(embedder[1]) as encoder, pytest.raises(UserError, match="gives one embedding per text"):
        encoder.hidden_states(["a"])
    with pytest.raises(UserError, match=r"max_seq_len=65 is not in 1\.\.64"):
        load_encoder(embedder[1], max_seq_len=65)
    with pytest.raises(UserError, match="batch_tokens=0 is not a whole number above 0"):
        load_encoder(embedder[1], batch_tokens=0)
    with pytest.raises(UserError, match="truncate='yes' is not True or False"):
        load_encoder(embedder[1], truncate="yes")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="provider 'tensorrt' doesn't run a bundle for cpu"):
        load_encoder(embedder[1], provider="tensorrt")


def test_it_is_not_prepared(embedder: Any) -> None:
    """Its session would open the graph itself all the same."""
    with pytest.raises(UserError, match="a bundle for features; only bundles that generate text are prepared"):
        prepare(embedder[1], read_manifest(embedder[1]))
    assert not (embedder[1] / "prepared").exists()


def test_closed(embedder: Any) -> None:
    encoder = load_encoder(embedder[1])
    encoder.close()
    encoder.close()
    with pytest.raises(UserError, match="this session is closed"):
        encoder.embed(["a"])


def test_hidden_states_of_every_token(build_bundle: Build, tmp_path: Path) -> None:
    model, bundle, _ = built(build_bundle, tmp_path, "features")
    with load_encoder(bundle) as encoder:
        for ids, states in zip([[5, 6, 7], [9]], encoder.hidden_states([[5, 6, 7], [9]]), strict=True):
            with torch.no_grad():
                assert np.abs(states - model(torch.tensor([ids]))[0][0].numpy()).max() <= 2e-5
        with pytest.raises(UserError, match="for one embedding per text build it with --pooling last or mean"):
            encoder.embed(["a"])


def test_a_classifier_without_a_pad_token_takes_texts_one_by_one(build_bundle: Build, tmp_path: Path) -> None:
    model, bundle, _ = built(build_bundle, tmp_path, "sequence-classification", None, pad_token_id=None)
    with load_encoder(bundle) as encoder:
        for text, row in zip(TEXTS, encoder.logits(TEXTS), strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([encoder.tokenizer.encode(text)])).logits[0].numpy()
            assert np.abs(row - wanted).max() <= 2e-5


def test_the_embed_command(embedder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle, _ = embedder
    with load_encoder(bundle) as encoder:
        wanted = encoder.embed(TEXTS)
    lines, objects = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    lines.write_text("".join(f"{text}\n" for text in TEXTS))
    assert cli.main(["embed", str(bundle), str(lines), "-o", str(tmp_path / "out.npy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": f"{tmp_path}/out.npy", "texts": 5}
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), wanted)
    objects.write_text("".join(json.dumps(text) + "\n" for text in [TEXTS[0], {"body": TEXTS[1]}]))
    assert cli.main(["embed", str(bundle), str(objects), "--field", "body"]) == 0
    rows = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    assert np.abs(np.array(rows, np.float32) - wanted[:2]).max() <= 2e-6


def test_the_classify_command(classifier: Any, tagger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text in TEXTS))
    assert cli.main(["classify", str(classifier[1]), str(texts)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with load_encoder(classifier[1]) as encoder:
        assert found == [dataclasses.asdict(label) for label in encoder.classify(TEXTS)]
    assert cli.main(["classify", str(tagger[1]), str(texts), "-o", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.jsonl: 5 texts classified\n"
    spans = [json.loads(line)["spans"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with load_encoder(tagger[1]) as encoder:
        assert [[Span(**span) for span in of] for of in spans] == encoder.classify_tokens(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\ntwo\n", "a.txt, line 2: empty; each line needs a text"),
        ("a.jsonl", '"a"\n{\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"body": "a"}\n', r"a.jsonl, line 1: no 'text' among \['body'\]; name another with --field"),
        ("a.jsonl", "7\n", "a.jsonl, line 1: 7 is neither a text nor a list of token ids"),
        ("none.txt", None, "none.txt: can't be read"),
    ],
)
def test_input_that_is_refused_leaves_nothing(
    name: str, content: str | None, message: str, embedder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["embed", str(embedder[1]), str(tmp_path / name), "-o", str(tmp_path / "out.npy")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_results_replace_nothing_but_results(
    classifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, pipe, link = tmp_path / "texts.txt", tmp_path / "pipe", tmp_path / "link"
    texts.write_text("one\ntwo\n")
    os.mkfifo(pipe)
    link.symlink_to("elsewhere")
    command = ["classify", str(classifier[1]), str(texts), "-o"]
    for place, message in (
        (pipe, "exists and is not a regular file; name another with -o, or leave it out"),
        (tmp_path, "exists and is not a regular file"),
        (texts, "holds the texts, and results would replace them; name another with -o"),
    ):
        assert cli.main([*command, str(place)]) == 2
        assert f"{place}: {message}" in capsys.readouterr().err
    assert pipe.is_fifo() and texts.read_text() == "one\ntwo\n"
    assert cli.main([*command, str(link)]) == 0
    assert link.is_symlink() and (tmp_path / "elsewhere").read_text().count("\n") == 2


def test_a_text_that_is_too_long_is_told_by_its_line(
    embedder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text(f"one\ntwo\n{'x' * 65}\n")
    assert cli.main(["embed", str(embedder[1]), str(tmp_path / "texts.txt")]) == 2
    assert "text 3 has 65 tokens, at most 64 fit" in capsys.readouterr().err


def test_a_generating_bundle_is_refused_in_one_line(
    demo_bundles: dict[str, Path], embedder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["embed", str(demo_bundles["fp32"])]) == 2
    assert "a bundle for causal-lm; open it with glm4runtime.load; " in capsys.readouterr().err
    for command in (["generate", "--prompt", "a"], ["bench"]):
        assert cli.main([command[0], str(embedder[1]), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1 and "a bundle for features; open it with glm4runtime.load_encoder; on the" in error
        )
