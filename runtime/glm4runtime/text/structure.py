"""Structured output: which tokens keep an answer in its structure, by llguidance (the extra ``structured``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm4runtime.contract import UserError, installing
from glm4runtime.text.grammar import Structure, StructureError, grammar_of, tool_structure
from glm4runtime.text.stop import StopStrings
from glm4runtime.text.tokenizer import Tokenizer
from glm4runtime.text.turn import THINK_END

__all__ = ["Matcher", "Structure", "StructureError", "Vocabulary", "compile_structure", "fill_masks", "tool_structure"]

Mask = NDArray[np.uint32]  # [ceil(vocabulary / 32)]: bit i % 32 of word i // 32 is set where token i is allowed


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(f"structured output needs llguidance; {installing('structured')}") from error
    return llguidance


class Vocabulary:
    """A tokenizer's tokens as llguidance holds them: a second to make for GLM-4's 151552, then shared by all requests.

    Only what the tokenizer calls special is special to a grammar, so ``<think>`` may be text there; ids behind the
    tokenizer's last, up to the model's vocabulary, are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop: Sequence[int]) -> None:
        """vocab_size: the model's, as wide as its logits. stop: the tokens that may end an answer.

        Raises UserError where llguidance isn't installed, or ``stop`` has no tokens of the vocabulary.
        """
        library = _llguidance()
        ends = [i for i in stop if 0 <= i < vocab_size]
        if not ends:
            raise UserError(f"structured output: none of the stop tokens {list(stop)} is below {vocab_size}")
        count = min(tokenizer.vocab_size, vocab_size)
        self.tokenizer, self.size = tokenizer, vocab_size
        self.tokens = [tokenizer.token_bytes(i) for i in range(count)] + [b""] * (vocab_size - count)
        self.special = [i for i in range(count) if tokenizer.is_special(i)]
        self.think_end = tokenizer.token_id(THINK_END)
        wrapper = library.TokenizerWrapper(_Source(self, ends[0]))
        self.library = library.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends)
        self.limits = library.LLParserLimits(
            initial_lexer_fuel=400_000,
            max_lexer_states=20_000,
            max_grammar_size=100_000,
            precompute_large_lexemes=False,
            verbose_errors=False,
        )
        self.newlines = [i for i, token in enumerate(self.tokens) if token in (b"\n", b"\n\n")]
        self.words = -(-vocab_size // 32)

    @cached_property
    def thought_masks(self) -> list[Mask]:
        """What a thought may go on with, by how many characters of ``</think>`` it ends with.

        No stop or other special token, since an answer that ends in its thought has no document; and no token that
        holds more than blanks behind the mark, since that would be the answer's beginning, unchecked.
        """
        text = [i for i, token in enumerate(self.tokens) if token]
        mark = self.think_end
        text = sorted({*text} - {*self.special} | ({mark} if mark is not None and self.tokens[mark] else set()))
        end = THINK_END.encode()
        closing = [i for i in text if b">" in self.tokens[i]]
        masks = []
        for held in range(len(end)):
            mask = packed(text, self.words)
            bad = [i for i in closing if (end[:held] + self.tokens[i]).partition(end)[2].strip()]
            mask &= ~packed(bad, self.words)
            masks.append(mask)
        return masks


class _Source:
    """What llguidance's TokenizerWrapper asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        self.eos_token_id = end
        self.tokens, self.special_token_ids = vocabulary.tokens, vocabulary.special
        self._tokenizer = vocabulary.tokenizer
        self._single = {token: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of text that a grammar forces."""
        data = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(data.decode(errors="replace"))
        if b"".join(self.tokens[i] for i in ids) == data and not any(self._tokenizer.is_special(i) for i in ids):
            return ids
        return [self._single[data[i : i + 1]] for i in range(len(data))]  # a special token's letters, not the token


def packed(ids: Sequence[int], words: int) -> Mask:
    """A mask that allows ``ids``."""
    bits = np.zeros(words * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def compile_structure(structure: Structure, vocabulary: Vocabulary, *, thinking: bool = False) -> Matcher:
    """What keeps one answer in its structure. Takes up to a second or so for large schemas, without the GIL.

    thinking: the prompt ended inside ``<think>``; the structure begins behind ``</think>``.

    Raises StructureError, with llguidance's own words, for what it can't enforce: keywords that it doesn't know, such
    as ``not``, ``if`` and ``uniqueItems``, remote references, lookarounds, and what is too complex or contradicts
    itself.
    """
    library = _llguidance()
    grammar = grammar_of(structure)
    text = library.LLMatcher.grammar_from_regex(grammar) if isinstance(grammar, str) else json.dumps(grammar)
    matcher = library.LLMatcher(vocabulary.library, text, log_level=0, limits=vocabulary.limits)
    if matcher.is_error():
        raise StructureError(f"{structure.kind}: can't be enforced: {_first_lines(matcher.get_error())}")
    if warnings := matcher.get_grammar_warnings():
        raise StructureError(f"{structure.kind}: can't be enforced: {'; '.join(warnings)}")
    # Models begin their answers with a blank line, as the template has it, but a regex means the whole text.
    blank = thinking or structure.kind not in ("regex", "lark")
    made = Matcher(vocabulary, matcher, blank=blank, thought=StopStrings([THINK_END]) if thinking else None)
    made.check_possible()
    return made


class Matcher:
    """Follows one answer. :func:`fill_masks` makes ``mask``, :meth:`consume` takes the token that was chosen by it."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any, *, blank: bool, thought: StopStrings | None) -> None:
        """blank: a token of newlines may come first. thought: looks for its end, None behind it."""
        self.vocabulary = vocabulary
        self._matcher, self._blank, self._thought = matcher, blank, thought
        self._decoder = vocabulary.tokenizer.stream()
        self._mask = np.zeros(vocabulary.words, np.uint32)

    @property
    def mask(self) -> Mask:
        """The tokens allowed next, as of the last fill; uint32 [ceil(vocabulary / 32)], the matcher's own.

        Raises StructureError where the grammar ran into a limit of llguidance's.
        """
        self._check()
        return self._mask

    @property
    def finished(self) -> bool:
        """Whether the answer is whole and nothing but a stop token can follow."""
        return self._thought is None and bool(self._matcher.is_stopped())

    def consume(self, token: int) -> None:
        """Take a token, the stop token at the end too. Raises StructureError where it isn't allowed."""
        if self._thought is not None:
            mark = token == self.vocabulary.think_end
            self._thought.push(THINK_END if mark else self._decoder.push(token))
            if self._thought.found:
                rest, self._thought = self._thought.rest, None
                if rest.strip():
                    raise StructureError(f"the token behind the thought begins the answer: {rest!r:.80}")
            return
        blank, self._blank = self._blank and token in self.vocabulary.newlines, False
        if blank and not self._matcher.validate_tokens([token]):
            return
        if not self._matcher.consume_token(token):
            text = self.vocabulary.tokenizer.decode([token], skip_special_tokens=False)
            raise StructureError(f"the token {token} ({text!r}) leaves the structure")

    def copy(self) -> Matcher:
        """Another answer's, from here on."""
        thought = None if self._thought is None else StopStrings([THINK_END])
        if thought is not None and self._thought is not None:
            thought.restore(self._thought.state())
        other = Matcher(self.vocabulary, self._matcher.deep_copy(), blank=self._blank, thought=thought)
        other._decoder.restore(self._decoder.state())
        return other

    def check_possible(self) -> None:
        """Raises StructureError where no answer fits the structure."""
        row = np.zeros(self.vocabulary.words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()
        if not row.any():
            raise StructureError("the structure allows no answer at all")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise StructureError(f"the structure can't be followed any more: {_first_lines(self._matcher.get_error())}")

    def _fill(self) -> None:
        if self._thought is not None:
            np.copyto(self._mask, self.vocabulary.thought_masks[len(self._thought.held)])
            return
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._blank:
            self._mask |= packed(self.vocabulary.newlines, self.vocabulary.words)


def fill_masks(matchers: Sequence[Matcher]) -> None:
    """Compute the masks of matchers, one after another: the engine does so while a graph runs, on cores that it shares.

    What goes wrong in one is raised where its mask is read, and leaves the others alone.
    """
    for matcher in matchers:
        matcher._fill()


def _first_lines(message: str) -> str:
    return " ".join(message.split("<state>")[0].split())[:300]
