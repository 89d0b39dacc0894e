"""From a label per token to spans of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OUTSIDE = "O"  # the label of tokens that are no part of any span


@dataclass(frozen=True)
class Span:
    """A stretch of a text with one label: characters ``start`` to ``end``, and the mean of its tokens' scores."""

    start: int
    end: int
    label: str
    score: float
    text: str


def spans_of(
    text: str, offsets: Sequence[tuple[int, int] | None], scores: np.ndarray, labels: Sequence[str]
) -> list[Span]:
    """Neighbouring tokens of one label as spans; scores are probabilities, float32 [tokens, labels].

    ``B-PER`` begins a span with the label ``PER``, ``I-PER`` goes on with it, as any label without a prefix does;
    OUTSIDE is left out. The rules of transformers' pipeline with ``aggregation_strategy="simple"``.
    """
    groups: list[tuple[str, list[int]]] = []  # label, tokens
    for index, best in enumerate(scores.argmax(-1).tolist()):
        if offsets[index] is None:
            continue
        prefix, label = labels[best][:2], labels[best]
        if prefix in ("B-", "I-"):
            label = label[2:]
        if groups and groups[-1][0] == label and prefix != "B-":
            groups[-1][1].append(index)
        else:
            groups.append((label, [index]))
    spans = []
    for label, tokens in groups:
        first, last = offsets[tokens[0]], offsets[tokens[-1]]
        if label != OUTSIDE and first is not None and last is not None:
            score = float(scores[tokens].max(-1).mean())
            spans.append(Span(first[0], last[1], label, score, text[first[0] : last[1]]))
    return spans
