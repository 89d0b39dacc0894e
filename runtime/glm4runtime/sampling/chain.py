"""The processors of one request in their order, and the mask of what a grammar allows."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from glm4runtime.contract import UserError
from glm4runtime.sampling.dry import Dry
from glm4runtime.sampling.history import History
from glm4runtime.sampling.params import SamplingParams
from glm4runtime.sampling.penalties import (
    AnswerPenalties,
    Ban,
    LogitBias,
    NoRepeatNgram,
    Processor,
    RepetitionPenalty,
)
from glm4runtime.sampling.rows import Row, token_ids
from glm4runtime.sampling.scratch import Scratch

# What each byte of a mask adds to its eight logits: 0 where the bit is set, -inf where it isn't. Adding looked-up
# numbers takes an eighth of the time of writing -inf where unpacked bits say so: it has no branches.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_ADDENDS = np.where(_BITS, np.float32(0), np.float32(-np.inf))


class Chain:
    """Gives rows of logits as processors leave them, in scratch memory."""

    def __init__(self, params: SamplingParams, scratch: Scratch, stop: Collection[int]) -> None:
        """Raises UserError for a token id outside the vocabulary."""
        self._scratch = scratch
        self._processors = _processors(params, scratch.vocab_size, stop)

    def __bool__(self) -> bool:
        """Whether there's anything to do besides masking."""
        return bool(self._processors)

    def __call__(self, logits: Row, history: History, allowed: NDArray[np.uint32] | None) -> Row:
        """The row after all processors and the mask, in scratch memory; ``logits`` stay as they are."""
        scores = self._scratch.scores
        np.copyto(scores, logits)
        with np.errstate(over="ignore", under="ignore"):
            for process in self._processors:
                process(scores, history)
        if allowed is not None:
            self._forbid(scores, allowed)
        return scores

    def forget(self) -> None:
        """The history was cut back."""
        for processor in self._processors:
            processor.forget()

    def _forbid(self, scores: Row, allowed: NDArray[np.uint32]) -> None:
        check_mask(allowed, scores.size)
        addends, words = self._scratch.addends, np.ascontiguousarray(allowed, "<u4")
        np.take(_ADDENDS, words.view(np.uint8), axis=0, out=addends, mode="clip")
        scores += addends.reshape(-1)[: scores.size]


def check_mask(allowed: NDArray[np.uint32], vocab_size: int) -> None:
    """Raises ValueError unless this is uint32 [ceil(vocab_size / 32)]."""
    words = -(-vocab_size // 32)
    if allowed.dtype != np.uint32 or allowed.shape != (words,):
        found = f"{allowed.dtype} {list(allowed.shape)}"
        raise ValueError(f"allowed: expected uint32 [{words}], a bit for each of {vocab_size} tokens, found {found}")


def is_allowed(allowed: NDArray[np.uint32], token: int) -> bool:
    """Whether a mask has a token's bit."""
    return bool(int(allowed[token // 32]) >> token % 32 & 1)


def all_forbidden() -> UserError:
    """What is raised where no token is left."""
    return UserError(
        "sampling: every token is forbidden here, by banned_tokens, min_new_tokens, no_repeat_ngram_size or the mask "
        "of a grammar together; loosen one of them"
    )


def _processors(params: SamplingParams, vocab_size: int, stop: Collection[int]) -> list[Processor]:
    """Those that are on, in the order of transformers' ``_get_logits_processor`` (generation/utils.py, 5.24).

    That is sequence_bias, repetition_penalty, no_repeat_ngram_size, min_new_tokens, suppress_tokens, and what it has no
    name for behind them. OpenAI's penalties and DRY follow the repetition penalty, as in llama.cpp (common_sampler_init
    and llama_sampler_penalties_apply).
    """
    bias, banned = params.logit_bias, params.banned_tokens
    bias_ids = token_ids("logit_bias", list(bias), vocab_size)
    banned_ids = token_ids("banned_tokens", banned, vocab_size)
    breakers = token_ids("dry_sequence_breakers", params.dry_sequence_breakers, vocab_size).tolist()
    penalties = params.presence_penalty, params.frequency_penalty
    found: list[Processor] = []
    if bias:
        found.append(LogitBias(bias_ids, bias))
    if params.repetition_penalty != 1:
        found.append(RepetitionPenalty(params.repetition_penalty))
    if any(penalties):
        found.append(AnswerPenalties(*penalties, vocab_size))
    if params.dry_multiplier:
        found.append(Dry(params.dry_multiplier, params.dry_base, params.dry_allowed_length, breakers))
    if params.no_repeat_ngram_size:
        found.append(NoRepeatNgram(params.no_repeat_ngram_size))
    if params.min_new_tokens and stop:
        found.append(Ban(token_ids("stop", sorted(stop), vocab_size), params.min_new_tokens))
    if banned:
        found.append(Ban(banned_ids))
    return found
