"""The texts that ``verify`` runs a bundle over, and the logits it finds there, by phase.

``prefill``       prompts, the row behind their last token
``decode``        greedy steps behind them
``continuation``  the same prompts in two prefills
``chat``          the prompts through the chat template, and some steps behind them
``chunks``        a prompt over two borders of the runner's chunks, some steps behind it, and its last rows again
``long``          a full cache: a prompt and the steps that fill it, and the prompt's last rows again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from glm4export.calibration.streamed import Text
from glm4runtime.backends.held_row import HeldRow, whole
from glm4runtime.backends.runner import MAX_RUN, Runner
from glm4runtime.contract import LOG_SUM, TOP_IDS, TOP_LOGITS, BundleError, UserError
from glm4runtime.session import Session

PHASES = ("prefill", "decode", "continuation", "chat", "chunks", "long")
PROMPTS = (
    "What is the capital of France?",
    "Hello, who are you?",
    "12 + 7 =",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "请用中文介绍一下你自己。",
)
_RANDOM_LENGTHS = (1, 5, 16, 33)  # prompts for a bundle without a tokenizer
_FEW_STEPS = 8  # behind the prompts of chat and chunks: those of the decode phase see enough
# Tokens in a chunk of the chunks phase, if the runner's aren't shorter still: a border's arithmetic is the same at any
# size, and three chunks of 512 would take longer than all other phases together. The long phase runs whole chunks.
_CHUNK = 64
_TAIL = 3  # tokens behind the second border
_SUM_ERROR = 1e-4  # of a row's log_sum_exp: what a session allows for (docs/gpu.md)
_AT_ONCE = 4  # chunks that one call computes; between the calls the bar moves


@dataclass(frozen=True)
class Run:
    """One text that the bundle was run over."""

    tokens: list[int]
    found: list[tuple[str, int, np.ndarray]]  # phase, position in the text, logits float32 [vocab]
    prompt: str | None = None  # whose greedy tokens are reported one by one
    clipped: float | None = None  # of an int8 cache: the share of its values that are at the ends of its range

    @property
    def text(self) -> Text:
        """What the reference is asked for."""
        return Text(self.tokens, first=min(at for _, at, _ in self.found))


def run_phases(session: Session, given: Sequence[str], steps: int, long: bool) -> tuple[list[Run], tuple[str, ...]]:
    """Runs over the given prompts (where none are, the built-in ones), and for each phase left out the reason."""
    runner, few = session.runner, min(steps, _FEW_STEPS)
    prompts = _prompts(session, given)
    chats, no_chat = _chats(session, given or [text for text, _ in _builtin(session)])
    chunk = min(runner.prefill_chunk, _CHUNK, (runner.max_seq_len - _TAIL) // 2) // runner.granule * runner.granule
    left_out = [f"chat: {no_chat}"] if no_chat else []
    left_out += [] if chunk > 0 else [f"chunks: a cache of {runner.max_seq_len} tokens is too short for two borders"]
    left_out += [] if long else ["long: the last rows of the cache are compared with --long"]
    runs = []
    with tqdm(desc="  bundle", unit=" tokens", leave=False, disable=None) as bar:
        for name, ids in prompts:
            runs.append(_greedy(runner, ids, steps, ("prefill", "decode"), bar, prompt=name))
            runs[-1].found.extend(_in_two_chunks(runner, ids[: runner.max_seq_len]))
        runs += [_greedy(runner, ids, few, ("chat", "chat"), bar) for ids in chats]
        if chunk > 0:
            with _chunks_of(runner, chunk):
                ids = _sample(session, 2 * chunk + _TAIL)
                runs.append(_greedy(runner, ids, few, ("chunks", "chunks"), bar))
                runs[-1].found.extend(_last_rows(runner, ids, "chunks"))
        if long:
            behind = min(steps, runner.max_seq_len - 1)
            ids = _sample(session, runner.max_seq_len - behind)
            runs.append(_greedy(runner, ids, behind, ("long", "long"), bar))
            runs[-1].found.extend(_last_rows(runner, ids, "long"))
    return runs, tuple(left_out)


def _greedy(
    runner: Runner, ids: Sequence[int], steps: int, phases: tuple[str, str], bar: tqdm[None], prompt: str | None = None
) -> Run:
    """The prompt, cut where the cache ends, and as many steps as still fit; ``phases``: its last row's, and theirs."""
    runner.rewind()
    tokens = list(ids[: runner.max_seq_len])
    step = _AT_ONCE * runner.prefill_chunk
    for start in range(0, max(1, len(tokens)), step):
        row = runner.prefill(tokens[start : start + step])
        bar.update(runner.length - start)
    found = [(phases[0], len(tokens) - 1, row.copy())]
    for _ in range(min(steps, runner.max_seq_len - len(tokens))):
        tokens.append(int(found[-1][2].argmax()))
        found.append((phases[1], len(tokens) - 1, _decoded(runner, tokens[-1])))
        bar.update()
    return Run(tokens, found, prompt, runner.cache_clipped())


def _decoded(runner: Runner, token: int) -> np.ndarray:
    """A step's logits. Raises BundleError where tokens that a session would choose among aren't its most probable."""
    held = runner.step(token, hold=runner.top_count > 0)
    row = whole(held).copy()
    if isinstance(held, HeldRow) and np.isfinite(row).all():  # others are fetched and refused
        least = np.partition(row, -len(held.ids))[-len(held.ids)]
        total = row.max() + np.log(np.exp(row.astype(np.float64) - row.max()).sum())
        named = np.array_equal(row[held.ids], held.values) and len(set(held.ids.tolist())) == len(held.ids)
        if not (named and held.values[-1] >= least and abs(held.log_sum - total) < _SUM_ERROR):
            raise BundleError(
                f"{TOP_LOGITS}, {TOP_IDS} and {LOG_SUM} aren't those of the logits beside them: build without "
                "--output-top-logits"
            )
    return row


def _in_two_chunks(runner: Runner, ids: Sequence[int]) -> Iterator[tuple[str, int, np.ndarray]]:
    """The prompt's last logits, computed in two prefills; nothing for a prompt of one token."""
    if len(ids) > 1:
        runner.rewind()
        runner.prefill(ids[: len(ids) // 2])
        yield "continuation", len(ids) - 1, runner.prefill(ids[len(ids) // 2 :]).copy()


def _last_rows(runner: Runner, ids: Sequence[int], phase: str) -> Iterator[tuple[str, int, np.ndarray]]:
    """Behind each of the prompt's last tokens, in one run over a draft: more texts than greedy steps come to."""
    first = max(0, len(ids) - MAX_RUN)
    runner.rewind(first)
    for at, row in enumerate(runner.verify(ids[first:]).copy(), first):
        yield phase, at, row


@contextmanager
def _chunks_of(runner: Runner, size: int) -> Iterator[None]:
    """Have prompts computed ``size`` tokens per run, fewer than its buffers have room for."""
    room, runner.prefill_chunk = runner.prefill_chunk, size
    try:
        yield
    finally:
        runner.prefill_chunk = room


def _prompts(session: Session, given: Sequence[str]) -> list[tuple[str, list[int]]]:
    if given:
        return [(text, session.tokenizer.encode(text)) for text in given]
    if builtin := _builtin(session):
        return builtin
    longest = session.runner.max_seq_len
    return [(f"{length} random tokens", _random(session, length)) for length in _RANDOM_LENGTHS if length <= longest]


def _builtin(session: Session) -> list[tuple[str, list[int]]]:
    """The built-in prompts, but those that the bundle's tokenizer, if there's one, has no tokens for."""
    if "tokenizer.json" not in session.manifest.files:
        return []
    prompts = ((text, session.tokenizer.encode(text)) for text in PROMPTS)
    return [(text, ids) for text, ids in prompts if ids]


def _chats(session: Session, texts: Sequence[str]) -> tuple[list[list[int]], str]:
    """The texts as a user's turn each, or the reason why there are none."""
    if not texts:
        return [], "the bundle has no tokenizer that knows the prompts"
    try:
        turns = [session.template.render([{"role": "user", "content": text}]) for text in texts]
    except UserError as error:
        return [], str(error)
    return [session.tokenizer.encode(turn) for turn in turns], ""


def _sample(session: Session, count: int) -> list[int]:
    """So many tokens: the built-in prompts over and over, in a random order.

    On random tokens a trained model says little that a fault could change: the embedded one's mean KL under a halved
    int8 cache is a tenth of what it is on these.
    """
    pieces = [session.tokenizer.encode(text + "\n") for text, _ in _builtin(session)]
    if not pieces:
        return _random(session, count)
    rng = np.random.default_rng(0)
    ids: list[int] = []
    while len(ids) < count:
        ids += pieces[rng.integers(len(pieces))]
    return ids[:count]


def _random(session: Session, count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, session.manifest.vocab_size, count).tolist()
    return tokens
