"""Perplexity of a text that may be longer than the cache: windows, each of which scores what the one before did not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from glm4export.terminal.progress import token_bar
from glm4runtime.contract import UserError
from glm4runtime.scoring import log_probabilities
from glm4runtime.session import Session

WINDOW = 2048  # tokens, as perplexities are usually given for


@dataclass(frozen=True)
class Perplexity:
    """Of one text."""

    tokens: int  # scored
    bytes: int  # of UTF-8 that those tokens stand for
    nats: float  # negative log-probability of them all
    window: int
    stride: int

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the mean loss."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def perplexity(
    session: Session, text: str, *, window: int | None = None, stride: int | None = None, prefix: str = ""
) -> Perplexity:
    """Score a text, as https://huggingface.co/docs/transformers/perplexity does with a sliding window.

    window: tokens that a run sees, at most the cache and one more, its default up to WINDOW. stride: tokens from one
    window's begin to the next one's, by default half a window; a small one gives more context and takes longer. prefix:
    text in front of every window, such as ``[gMASK]<sop>``, whose tokens aren't scored; without one the text's first
    token isn't. Raises UserError for sizes out of range and a text of too few tokens.
    """
    head, ids = session.tokenizer.encode(prefix), session.tokenizer.encode(text)
    most = session.runner.max_seq_len + 1 - len(head)
    if most < 2:
        raise UserError(
            f"--prefix has {len(head)} tokens and the cache {session.runner.max_seq_len}, which leaves no room for a "
            "text; shorten it, or open or build the bundle with a larger max_seq_len"
        )
    size = min(WINDOW, most) if window is None else window
    step = max(1, size // 2) if stride is None else stride
    if not 2 <= size <= most:
        raise UserError(f"--window {size}: expected 2 to {most}, what the cache holds beside the prefix, and one more")
    if not 1 <= step <= size - 1:
        raise UserError(f"--stride {step}: expected 1 to {size - 1}, so that windows of {size} tokens overlap")
    first = 0 if head else 1
    if len(ids) <= first:
        raise UserError(f"the text has {len(ids)} tokens; at least {first + 1} are needed")
    nats = 0.0
    with token_bar(len(ids) - first) as progress:
        for begin, end, scored in _windows(len(ids), size, step, first):
            values, _ = log_probabilities(session.runner, [*head, *ids[begin:end]], len(head) + scored - begin)
            nats -= float(values.sum())
            progress(end - scored)
    size_of_first = len(session.tokenizer.token_bytes(ids[0])) if first else 0
    return Perplexity(len(ids) - first, len(text.encode()) - size_of_first, nats, size, step)


def _windows(tokens: int, size: int, step: int, first: int) -> Iterator[tuple[int, int, int]]:
    """Begin and end of every window, and where what it scores begins; ``first`` of all is the text's first scored."""
    scored = first
    for begin in range(0, tokens, step):
        end = min(begin + size, tokens)
        yield begin, end, scored
        if end == tokens:
            return
        scored = end
