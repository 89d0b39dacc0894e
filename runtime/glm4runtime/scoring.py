"""How probable a bundle finds a given text: log-probabilities of tokens, for losses, perplexity and ranking.

Log-probabilities are natural logarithms of the softmax over the whole vocabulary, taken in float64 of the graph's
float32 logits; a loss is their negated mean, as ``Glm4ForCausalLM(labels=...)`` computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.contract import UserError


@dataclass(frozen=True)
class Score:
    """What a bundle makes of one continuation."""

    log_probability: float  # nats; the sum over its tokens
    tokens: int
    greedy: bool  # whether greedy decoding would have given these very tokens

    @property
    def mean(self) -> float:
        """Nats per token, for continuations of different lengths."""
        return self.log_probability / self.tokens


def log_probabilities(runner: Runner, ids: Sequence[int] | np.ndarray, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Of every token of ``ids`` from ``first`` on, given all in front of it: float64 and bool [len(ids) - first].

    The log-probability in nats, and whether no token was more probable. The tokens in front of ``first`` are a prompt,
    of which what the cache has already isn't computed again. Raises UserError unless ids of the vocabulary are given,
    at least one of them in front of ``first`` and one from there on, and the cache has room for all but the last.
    """
    every = runner.token_ids(ids)
    if not 1 <= first < len(every):
        raise UserError(
            f"{len(every)} tokens of which the first {first} are given leave nothing to score: at least one token must "
            "stand in front of what is scored, and one behind"
        )
    inputs = runner.check_prompt(every[:-1])
    values, greedy = [], []
    position = first
    for logits in _rows(runner, inputs, first):
        targets = every[position : position + len(logits)]
        chosen = logits[np.arange(len(targets)), targets]
        greedy.append(chosen == logits.max(axis=-1))
        values.append(chosen - _log_sum_exp(logits))
        position += len(targets)
    return np.concatenate(values), np.concatenate(greedy)


def score(runner: Runner, prompt: Sequence[int], continuation: Sequence[int]) -> Score:
    """The :class:`Score` of tokens that follow a prompt; raises UserError as :func:`log_probabilities`."""
    values, greedy = log_probabilities(runner, [*prompt, *continuation], len(prompt))
    return Score(float(values.sum()), len(values), bool(greedy.all()))


def _rows(runner: Runner, inputs: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Logits behind the tokens from ``first - 1`` on, a run's at a time: float32 [run, vocab]."""
    prompt = inputs[:first]
    start = runner.resume(prompt)
    yield runner.prefill(prompt[start:])[None]
    for at in range(first, len(inputs), MAX_RUN):
        run = inputs[at : at + MAX_RUN].tolist()
        yield runner.verify(run)
        for _ in run:
            runner.accept()


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """float64 [n] of float32 [n, vocab]."""
    largest = logits.max(axis=-1)
    total = np.exp(logits - largest[:, None], dtype=np.float64).sum(axis=-1)
    return np.asarray(largest + np.log(total))
