"""A request under way, and each of its answers: the engine thread's own state, which no other thread touches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from glm4runtime.engine.beams import BeamGroup
from glm4runtime.engine.failure import failure
from glm4runtime.engine.handle import Feed, RequestFailed
from glm4runtime.engine.request import Delta, FinishReason, Request, Result
from glm4runtime.sampling import Sampler
from glm4runtime.sampling.logprobs import TokenLogprobs, log_probabilities
from glm4runtime.speculation import Speculation
from glm4runtime.text.assistant import AnswerDelta, AnswerParser
from glm4runtime.text.structure import Matcher


class Answer:
    """One of a request's answers: what was chosen, and what is in the cache of it."""

    def __init__(self, job: Job, index: int, sampler: Sampler, parser: AnswerParser | None, matcher: Matcher | None):
        """parser: None where the bundle has no tokenizer. matcher: of a structured answer."""
        self.job, self.index = job, index
        self.sampler, self.parser, self.matcher = sampler, parser, matcher
        self.slot = -1
        self.rows = 0  # of the cache that are written
        self.tokens: list[int] = []  # chosen; the last one isn't in the cache yet
        self.speculation: Speculation[np.ndarray] | None = None  # such an answer has runs of its own
        self.finish_reason: FinishReason | None = None
        self.log_probability, self.scored = 0.0, 0  # of all tokens chosen, a stop token too: what best_of compares
        self.whole = Delta(index)

    @property
    def in_prompt(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.rows < len(self.job.ids)

    def choose(self, logits: np.ndarray) -> None:
        """Take the next token from its logits, float32 [vocab], and tell the reader; may finish the answer.

        Raises UserError where the logits are no numbers, or the grammar allows no token.
        """
        job, request = self.job, self.job.request
        allowed = None if self.matcher is None else self.matcher.mask
        token = self.sampler(logits, allowed)
        shown = request.logprobs is not None or job.compares
        scored = log_probabilities(logits[None], [token], request.logprobs or 0)[0] if shown else None
        if scored is not None:
            self.log_probability += scored.logprob
            self.scored += 1
        if self.matcher is not None:
            self.matcher.consume(token)
        if token in job.stop:
            self.finish("stop", token)
            return
        self.tokens.append(token)
        piece = self._pushed(token)
        kept = (scored,) if scored is not None and request.logprobs is not None else ()
        self._tell(replace(piece, tokens=(token,), logprobs=kept))
        if self.parser is not None and self.parser.stopped is not None:
            self.finish("stop", self.parser.stopped)
        elif len(self.tokens) >= request.params.max_new_tokens or job.room(len(self.tokens)) <= 0:
            self.finish("length")

    def replay(self, tokens: Sequence[int], cut: FinishReason | None = None) -> None:
        """Take tokens that were chosen elsewhere, a stop token at their end perhaps, as the whole answer.

        A stop string ends it nevertheless. cut: why there are no more, where they were still being chosen.
        """
        stop = tokens[-1] if tokens and tokens[-1] in self.job.stop else None
        self.tokens = []
        for token in tokens if stop is None else tokens[:-1]:
            self.tokens.append(token)
            self._tell(replace(self._pushed(token), tokens=(token,)))
            if self.parser is not None and self.parser.stopped is not None:
                self.finish("stop", self.parser.stopped)
                return
        self.finish(cut or ("length" if stop is None else "stop"), None if cut else stop)

    def _pushed(self, token: int) -> Delta:
        return Delta(self.index) if self.parser is None else self._told(self.parser.push(token))

    def finish(self, reason: FinishReason, stop: str | int | None = None) -> None:
        """End it, with what was held back of its text."""
        if self.finish_reason is not None:
            return
        piece = Delta(self.index) if self.parser is None else self._told(self.parser.finish(reason))
        if self.parser is not None and self.parser.finish_reason == "tool_calls":
            reason = "tool_calls"
        self.finish_reason = reason
        self._tell(replace(piece, finish_reason=reason, stop=stop))

    def end(self, reason: FinishReason) -> None:
        """End it from outside where it hasn't ended itself: with what there is, of beams the best."""
        if self.finish_reason is None and self.job.beams is not None:
            self.job.beams.cut(reason)
        self.finish(reason)

    def _told(self, piece: AnswerDelta) -> Delta:
        return Delta(self.index, piece.thought, piece.content, piece.tool_calls)

    def _tell(self, delta: Delta) -> None:
        self.whole = self.whole.joined(delta)
        if not self.job.compares:
            self.job.feed.put(delta)


@dataclass
class Job:
    """A request and what is computed for it."""

    request: Request
    ids: np.ndarray  # int64 [n], the prompt
    stop: frozenset[int]  # tokens that end an answer
    feed: Feed
    capacity: int  # tokens that a slot holds
    submitted: float
    salt: str  # what cached prompts are told apart by, beside their tokens
    answers: list[Answer] = field(default_factory=list)
    prompt_logits: np.ndarray = field(default_factory=lambda: np.empty(0))  # float32 [vocab], for answers that wait
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of its tokens but the first
    beams: BeamGroup | None = None

    @property
    def compares(self) -> bool:
        """Whether only the best of its answers are given, at the end."""
        return len(self.answers) > self.request.n or self.beams is not None

    def room(self, chosen: int) -> int:
        """Tokens that still have a row behind ``chosen`` ones, of which the last has none yet."""
        return self.capacity - len(self.ids) - (chosen - 1)

    def note(self, **times: float) -> None:
        """Put times into the feed's timing, in seconds since submit."""
        self.feed.timing = replace(self.feed.timing, **{name: now - self.submitted for name, now in times.items()})

    def count(self) -> None:
        """Bring the feed's usage up to date."""
        drafted = accepted = 0
        for answer in self.answers:
            if answer.speculation is not None:
                drafted += answer.speculation.counts.drafted
                accepted += answer.speculation.counts.accepted
        self.feed.usage = replace(
            self.feed.usage,
            completion_tokens=sum(len(answer.tokens) for answer in self.answers),
            drafted_tokens=drafted,
            accepted_tokens=accepted,
        )

    def close(self, error: RequestFailed | None = None) -> None:
        """Tell the reader that no more comes, and let go of the answers.

        A fault here is raised, and told to the reader too.
        """
        try:
            self.count()
            self.note(finished=time.monotonic())
            self.feed.end(self._result() if error is None else None, error)
        except BaseException as fault:
            self.feed.end(None, failure("the request failed", fault))
            raise
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the answers.

        They hold this job: until the garbage collector came, all of it would stay, row of logits included.
        """
        self.answers, self.beams = [], None

    def _result(self) -> Result:
        chosen = self._chosen()
        if self.compares:
            for delta in chosen:
                self.feed.put(delta)
        logprobs = None if self.request.prompt_logprobs is None else (None, *self.prompt_logprobs)
        return Result(tuple(chosen), self.feed.usage, self.feed.timing, logprobs)

    def _chosen(self) -> list[Delta]:
        if not self.compares:
            return [answer.whole for answer in self.answers]
        if self.beams is not None:
            return [answer.whole for answer in self.answers[: self.request.n]]
        best = sorted(self.answers, key=_rank)
        return [replace(answer.whole, choice=index) for index, answer in enumerate(best[: self.request.n])]


def _rank(answer: Answer) -> tuple[bool, bool, float]:
    """Whole ones first, then those with tokens, then by log-probability per token."""
    cut = answer.finish_reason in ("cancelled", "timeout")
    return cut, not answer.scored, -answer.log_probability / max(answer.scored, 1)
