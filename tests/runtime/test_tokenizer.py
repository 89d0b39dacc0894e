"""The tokenizer, and above all that streaming gives exactly what decoding everything at once gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from glm4runtime.contract import BundleError, UserError
from glm4runtime.text.tokenizer import Tokenizer
from tests.helpers.tokenizers import CORPUS, SPECIAL, make_raw

TEXTS = st.one_of(st.text(), st.text(alphabet="aé你好😀\u0301\u200d👩\ufffd \n", max_size=40), st.sampled_from(CORPUS))


RAW = make_raw()
TOKENIZER = Tokenizer(RAW)
BYTES = [RAW.token_to_id(c) for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
# Some ids are no token at all: logits are padded beyond the vocabulary.
IDS = st.lists(st.one_of(st.integers(0, RAW.get_vocab_size() + 3), st.sampled_from(BYTES)), max_size=40)


def byte_ids(data: bytes) -> list[int]:
    by_byte = {TOKENIZER.token_bytes(i): i for i in BYTES}
    return [by_byte[bytes([byte])] for byte in data]


def pieces(ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = TOKENIZER.stream(skip_special_tokens)
    return [*map(stream.push, ids), stream.finish()]


def test_byte_alphabet_is_the_tokenizers_package_s() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert {TOKENIZER.token_bytes(RAW.token_to_id(c)) for c in alphabet} == {bytes([b]) for b in range(256)}
    for i in BYTES:
        assert TOKENIZER.token_bytes(i).decode("utf-8", "replace") == TOKENIZER.decode([i])


@settings(deadline=None)
@given(TEXTS)
def test_encode_decode_is_the_identity(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == RAW.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL):
        assert TOKENIZER.decode(ids) == text.replace("Ā", "\x00")


@settings(deadline=None)
@given(TEXTS)
def test_stream_of_text_never_breaks_a_character(text: str) -> None:
    got = pieces(TOKENIZER.encode(text))
    assert "".join(got) == TOKENIZER.decode(TOKENIZER.encode(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@settings(max_examples=500, deadline=None)
@given(IDS, st.booleans())
def test_stream_equals_decode_for_any_ids(ids: list[int], skip_special_tokens: bool) -> None:
    got = pieces(ids, skip_special_tokens)
    assert "".join(got) == TOKENIZER.decode(ids, skip_special_tokens)
    assert "".join(got) == RAW.decode(ids, skip_special_tokens=skip_special_tokens)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([0x00, 0x41, *range(0x80, 0x100, 5), 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xA0, 0x8F, 0x90])))
def test_stream_equals_decode_for_any_bytes(data: list[int]) -> None:
    ids = byte_ids(bytes(data))
    got = pieces(ids)
    assert "".join(got) == TOKENIZER.decode(ids) == bytes(data).decode("utf-8", "replace")
    assert all(len(piece.encode()) <= 16 for piece in got)  # nothing piles up


@pytest.mark.parametrize(
    "data, expected",
    [
        ("你".encode(), ["", "", "你", ""]),
        ("😀a".encode(), ["", "", "", "😀", "a", ""]),
        (b"\xe4\xbd", ["", "", "\ufffd"]),  # the answer ended inside a character
        (b"\xe4A", ["", "\ufffdA", ""]),  # certain as soon as the next byte isn't a continuation
        (b"\xff", ["\ufffd", ""]),
        ("\ufffd".encode(), ["", "", "\ufffd", ""]),  # a U+FFFD that the model meant
    ],
)
def test_pieces_come_as_early_as_they_can(data: bytes, expected: list[str]) -> None:
    assert pieces(byte_ids(data)) == expected


def test_a_long_text_is_encoded_as_short_ones_are() -> None:
    """It goes another way, on which other threads aren't held up."""
    text = "".join(CORPUS) * (40_000 // len("".join(CORPUS)))
    assert TOKENIZER.encode(text) == RAW.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode_text(text, 100)[0] == RAW.encode(text, add_special_tokens=True).ids[:100]
    assert TOKENIZER.longest == max(len(TOKENIZER.token_bytes(id)) for id in range(TOKENIZER.vocab_size))


def test_special_tokens() -> None:
    user, think = TOKENIZER.token_id("<|user|>"), TOKENIZER.token_id("<think>")
    assert user is not None and think is not None and TOKENIZER.token_id("<|nothing|>") is None
    assert TOKENIZER.encode("<|user|>\nhi")[0] == user
    assert TOKENIZER.is_special(user) and not TOKENIZER.is_special(think)
    assert pieces([user, think]) == ["", "<think>", ""]
    assert pieces([user, think], skip_special_tokens=False) == ["<|user|>", "<think>", ""]
    first, *rest = byte_ids("你".encode())
    assert pieces([first, user, *rest]) == ["", "", "", "你", ""]  # as decode: the skipped token isn't there


def test_a_finished_stream_is_as_new() -> None:
    stream = TOKENIZER.stream()
    assert stream.push(byte_ids(b"\xe4")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.push(byte_ids(b"a")[0]) == "a"


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    RAW.save(str(path))
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.vocab_size == RAW.get_vocab_size() == TOKENIZER.vocab_size
    assert tokenizer.encode(CORPUS[1]) == TOKENIZER.encode(CORPUS[1])


def test_no_prefix_truncation_or_padding_from_the_file(tmp_path: Path) -> None:
    raw = make_raw()
    raw.enable_truncation(2)
    raw.enable_padding(length=64)
    path = tmp_path / "tokenizer.json"
    raw.save(str(path))
    assert Tokenizer.from_file(path).encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])


def test_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing\.json: no such file"):
        Tokenizer.from_file(tmp_path / "missing.json")
    for content in ("{", "[]", json.dumps({"model": {}})):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(BundleError, match=r"broken\.json: not a readable tokenizer\.json"):
            Tokenizer.from_file(tmp_path / "broken.json")


def test_refuses_what_is_not_byte_level_bpe(tmp_path: Path) -> None:
    raw = make_raw()
    raw.decoder = decoders.Metaspace()
    raw.save(str(tmp_path / "spaces.json"))
    with pytest.raises(UserError, match=r"spaces\.json: expected a BPE model with a ByteLevel decoder.*Metaspace"):
        Tokenizer.from_file(tmp_path / "spaces.json")
    words = RawTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="found WordLevel with NoneType"):
        Tokenizer(words)


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_ids_out_of_range(wrong: int) -> None:
    with pytest.raises(UserError, match=f"token id: expected 0 to .*, found {wrong}"):
        TOKENIZER.decode([0, wrong])
    with pytest.raises(UserError, match=f"token id: expected 0 to .*, found {wrong}"):
        TOKENIZER.stream().push(wrong)


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(UserError, match="not valid Unicode at character 1"):
        TOKENIZER.encode("a\ud800")


def damaged(**parts: object) -> bytes:
    return json.dumps({**json.loads(RAW.to_str()), **parts}).encode()


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "parts, message",
    [
        # `tokenizers` asks for 8 GB and aborts the process, panics, or divides by zero at the first text
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
            "normalizer 'Precompiled' has no place in a byte-level BPE; expected Lowercase, NFC, NFD, NFKC, NFKD",
        ),
        ({"normalizer": {"precompiled_charsmap": "/////w=="}}, "normalizer None has no place"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": ""}]}},
            "normalizer 'Prepend' has no place",
        ),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "pre_tokenizer 'FixedLength' has no place"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "FixedLength"}], "normalizers": []}},
            "pre_tokenizer 'FixedLength' has no place",
        ),
        ({"normalizer": "NFC"}, "not a readable tokenizer.json: expected an object with a type, found 'NFC'"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}}, "not a readable tokenizer.json: .*parenthesis"),
    ],
)
def test_parts_that_take_the_process_with_them(
    parts: dict[str, object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"^here: {message}"):
        Tokenizer.from_bytes(damaged(**parts), "here")
    assert capfd.readouterr().err == ""  # no panic of Rust's


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_a_model_of_words(key: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = {**json.loads(RAW.to_str())["model"], key: "##"}
    with pytest.raises(UserError, match=f"here: model: {key}='##' has no place in a byte-level BPE"):
        Tokenizer.from_bytes(damaged(model=model), "here")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "data, message",
    [
        (b"[" * 100000, "recursion"),
        (b'{"model": ' * 100000, "recursion"),
        (damaged()[:-1] + b', "normalizer": null}', "an object has a key twice"),
        (b"\xff", "can't decode"),
        (b"version https://git-lfs.github.com/spec/v1\noid", None),
    ],
)
def test_files_that_are_no_tokenizer(data: bytes, message: str | None) -> None:
    expected = "a git-lfs pointer, not the file" if message is None else f"not a readable tokenizer.json: .*{message}"
    with pytest.raises(BundleError, match=f"^here: {expected}"):
        Tokenizer.from_bytes(data, "here")


def test_a_panic_over_a_text_is_an_error() -> None:
    tokenizer = Tokenizer.from_bytes(damaged(pre_tokenizer=SPLIT), "here")
    with pytest.raises(
        UserError, match=r"the tokenizer failed on this text; is its tokenizer\.json damaged\?: .*retry"
    ):
        tokenizer.encode("a" * 40 + "!")


def test_what_training_left_behind_is_switched_off() -> None:
    """A post-processor that drops the text, and words split at random."""
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    model = {**json.loads(RAW.to_str())["model"], "dropout": 0.9}
    tokenizer = Tokenizer.from_bytes(damaged(post_processor=template, model=model), "here")
    for text in CORPUS:
        assert tokenizer.encode(text) == TOKENIZER.encode(text)
