"""Text to token ids and back, whole or one token at a time.

GLM-4's tokenizer.json is a byte-level BPE: every token stands for some bytes, and a character may be split over several
tokens. The `tokenizers` package does the encoding and decoding; streaming is done here, because its ``DecodeStream``
holds invalid bytes back for good and has no way to flush (joined, it differs from ``decode``).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from glm4runtime.contract import BundleError, UserError, refuse_pointer

__all__ = ["StreamDecoder", "Tokenizer"]


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (the table of GPT-2's ``bytes_to_unicode``).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_LONG = 20_000  # characters; shorter texts take a few milliseconds

# What a byte-level BPE is made of. Other parts of the package panic, or abort the process, where their settings don't
# fit: a Precompiled normalizer asks for gigabytes, a FixedLength of 0 divides by it.
_PARTS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"},
    "pre_tokenizer": {"ByteLevel", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation"},
    "post_processor": {"ByteLevel", "TemplateProcessing"},
}


def _check_parts(data: Any, name: str) -> None:
    """Refuse a tokenizer.json with parts that GLM-4's kind of tokenizer doesn't have. Raises UserError."""
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, found {type(data).__name__}")
    for key, known in _PARTS.items():
        for kind in _kinds(data.get(key)):
            if not isinstance(kind, str) or kind not in known:
                expected = ", ".join(sorted(known))
                raise UserError(f"{name}: {key} {kind!r:.100} has no place in a byte-level BPE; expected {expected}")
    model = data.get("model")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and model.get(key):
            raise UserError(f"{name}: model: {key}={model[key]!r:.100} has no place in a byte-level BPE")


def _kinds(part: Any) -> Iterator[Any]:
    """The types of a part; a Sequence's are its members'."""
    if part is None:
        return
    if not isinstance(part, dict):
        raise ValueError(f"expected an object with a type, found {part!r:.100}")
    if part.get("type") != "Sequence":
        yield part.get("type")
        return
    for members in (part.get("normalizers"), part.get("pretokenizers"), part.get("processors")):
        for member in members if isinstance(members, list) else []:
            yield from _kinds(member)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys, each once: of a part given twice, `tokenizers` would make both, and only one was looked at."""
    known = dict(pairs)
    if len(known) != len(pairs):
        raise ValueError("an object has a key twice")
    return known


@contextmanager
def _refusing(kind: type[UserError], what: str) -> Iterator[None]:
    """Make one error of what `tokenizers` raises: plain Exceptions, and panics, which are no Exceptions."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {error}") from error


class Tokenizer:
    """A byte-level BPE tokenizer. Use :meth:`from_file`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str = "tokenizer", *, whole_texts: bool = False) -> None:
        """Wrap a `tokenizers` object; ``name`` is what error messages call it.

        whole_texts: for :meth:`encode_text`; keeps what tokenizer.json puts around a text.

        Raises:
            UserError: it is not a byte-level BPE.
        """
        if not isinstance(tokenizer.model, models.BPE) or not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise UserError(
                f"{name}: expected a BPE model with a ByteLevel decoder, as GLM-4's, "
                f"found {type(tokenizer.model).__name__} with {type(tokenizer.decoder).__name__}"
            )
        # A training setup left in tokenizer.json would cut or pad prompts, or split words at random; what a
        # post-processor adds is the chat template's to write.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if not whole_texts:
            tokenizer.post_processor = None
        tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        self._most: int | None = None  # tokens that encodings are cut to
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._bytes: dict[int, bytes] = {}  # of the tokens streamed so far

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            BundleError: the file is missing or is not a tokenizer.json.
            UserError: it is not a byte-level BPE.
        """
        path = Path(path)
        if not path.is_file():
            raise BundleError(f"{path}: no such file; a bundle holds its checkpoint's tokenizer.json")
        try:
            return cls.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise BundleError(f"{path}: can't be read: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes, name: str, *, whole_texts: bool = False) -> Tokenizer:
        """The same of a file's content; ``name`` is what error messages call it, whole_texts as the class's."""
        refuse_pointer(data, name)
        try:
            _check_parts(json.loads(data, object_pairs_hook=_without_duplicates), name)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{name}: not a readable tokenizer.json: {error}") from error
        with _refusing(BundleError, f"{name}: not a readable tokenizer.json"):
            return cls(tokenizers.Tokenizer.from_buffer(data), name, whole_texts=whole_texts)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's logits may be padded beyond it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled ``text`` (``"<|user|>"``), or None."""
        return self._tokenizer.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Nothing is put in front: GLM-4's chat template writes ``[gMASK]<sop>`` itself.

        Raises:
            UserError: the text holds a lone surrogate, which UTF-8 can't express.
        """
        return list(self._encoded(text, special=False).ids)

    def encode_text(self, text: str, most: int | None = None) -> tuple[list[int], list[tuple[int, int] | None]]:
        """Token ids of a whole text as transformers' tokenizer gives them, and the characters that each stands for.

        None for tokens that tokenizer.json puts around a text. most: how many tokens in all, of which those around the
        text stay where it is cut at its end. Errors as :meth:`encode`'s.
        """
        encoded = self._encoded(text, special=True, most=most)
        marked = zip(encoded.offsets, encoded.special_tokens_mask, strict=True)
        return list(encoded.ids), [None if special else offsets for offsets, special in marked]

    def _encoded(self, text: str, *, special: bool, most: int | None = None) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # `tokenizers` would only say that it isn't a str
            raise UserError(f"text: not valid Unicode at character {error.start}: {error.reason}") from error
        with _refusing(UserError, "the tokenizer failed on this text; is its tokenizer.json damaged?"):
            if most != self._most:  # to set it takes the tokenizer for itself, while other threads may be encoding
                if most is None:
                    self._tokenizer.no_truncation()
                else:
                    self._tokenizer.enable_truncation(most)
                self._most = most
            if len(text) < _LONG:
                return self._tokenizer.encode(text, add_special_tokens=special)
            # The same, but other threads run meanwhile: a text of 4 MB would stop them for 15 seconds
            return self._tokenizer.encode_batch([text], add_special_tokens=special)[0]

    @cached_property
    def longest(self) -> int:
        """Characters of a text that one token may stand for: the bytes of the longest one.

        Four times that where a normalizer puts characters together.
        """
        most = max(len(self._bytes_of(token)) for token in self._tokenizer.get_vocab())
        return most if self._tokenizer.normalizer is None else 4 * most

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``. Ids that are no token are passed over; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id is negative or not below 2**32.
        """
        ids = list(ids)
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            wrong = next(i for i in ids if not 0 <= i < 2**32)
            raise UserError(f"token id: expected 0 to {self.vocab_size - 1}, found {wrong}") from error

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that a token stands for; empty if the id is no token.

        Raises:
            UserError: the id is negative or not below 2**32.
        """
        known = self._bytes.get(token_id)
        if known is None:
            try:
                token = self._tokenizer.id_to_token(token_id) or ""
            except OverflowError as error:
                raise UserError(f"token id: expected 0 to {self.vocab_size - 1}, found {token_id}") from error
            known = self._bytes[token_id] = self._bytes_of(token)
        return known

    @staticmethod
    def _bytes_of(token: str) -> bytes:
        # The ByteLevel decoder's own rule: a token with a character outside the byte alphabet, which only added tokens
        # can have, is text as it stands.
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether decoding with ``skip_special_tokens`` passes over this token."""
        return token_id >= 0 and self._tokenizer.id_to_token(token_id) in self._special


class StreamDecoder:
    """Decodes one token at a time; made by :meth:`Tokenizer.stream`.

    The pieces joined, with :meth:`finish`'s, equal ``Tokenizer.decode`` of all the ids. A piece never ends inside a
    character: bytes are held back until they are a character, or can't become one any more (then they are U+FFFD, as
    in ``decode``). At most three bytes are ever held back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is certain now and wasn't before this token; often one word, sometimes empty.

        Raises:
            UserError: the id is negative or not below 2**32.
        """
        token_bytes = self._tokenizer.token_bytes(token_id)
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(token_bytes)

    def finish(self) -> str:
        """The rest: U+FFFD if the tokens ended inside a character, else empty. The decoder is then as new."""
        return self._decoder.decode(b"", final=True)

    def state(self) -> tuple[bytes, int]:
        """What :meth:`restore` takes: the bytes held back."""
        return self._decoder.getstate()

    def restore(self, state: tuple[bytes, int]) -> None:
        """Go back to what was held back then."""
        self._decoder.setstate(state)
