"""What an engine is asked, and what it answers: plain data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from glm4runtime.contract import UserError, shown
from glm4runtime.sampling import SamplingParams
from glm4runtime.speculation import check_limit
from glm4runtime.text.answers import ToolCall
from glm4runtime.text.grammar import Structure
from glm4runtime.text.stop import Stop

if TYPE_CHECKING:
    from glm4runtime.sampling.logprobs import TokenLogprobs

#: ``stop``: a stop token or string came; ``length``: the token limit, or the end of the cache; ``tool_calls``: as
#: ``stop``, with at least one call in the answer; ``cancelled``; ``timeout``: the request's time was over.
FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "timeout"]

_PLAIN = SamplingParams()
_CHANGES_LOGITS = (
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "dry_multiplier",
    "logit_bias",
    "banned_tokens",
    "forced_tokens",
)

MOST_CHOICES = 64
MOST_LOGPROBS = 100  # alternatives per token
MOST_KEY = 256  # characters of key and salt


@dataclass(frozen=True)
class Request:
    """A prompt, or a conversation, and how to answer it.

    Exactly one of ``prompt`` (text, or token ids) and ``messages`` is given; the others have their defaults.

    Raises:
        UserError: a field is of the wrong type or out of its range, or two exclude each other.
    """

    prompt: str | Sequence[int] | None = None
    messages: Sequence[dict[str, Any]] | None = None  # as Session.chat's
    params: SamplingParams = field(default_factory=SamplingParams)
    tools: Sequence[dict[str, Any]] | None = None  # OpenAI-style function descriptions; with messages only
    template_variables: Mapping[str, Any] = field(default_factory=dict)  # whatever else the chat template reads
    stop: Stop = ()  # token ids and strings beside the bundle's own; strings end content, never a thought
    structure: Structure | None = None  # a schema, a regex, a grammar or the tools' format that the answer must have
    n: int = 1  # answers; that of index i has the seed ``params.seed + i``
    best_of: int | None = None  # compute so many answers and give the n whose tokens are the most probable
    num_beams: int = 1  # more than 1: beam search; the n best of them are given
    length_penalty: float = 1.0  # of beam search, as transformers'
    logprobs: int | None = None  # log-probabilities of the answer's tokens, with so many alternatives each
    prompt_logprobs: int | None = None  # the same of the prompt's
    lookup: int = 0  # guess up to so many tokens per run, see glm4runtime.lookup; such an answer has runs of its own
    draft: int = 0  # the same with guesses of the draft bundle that the engine was loaded with
    adapter: str | None = None  # the name of one that the engine was loaded with
    salt: str = ""  # requests share cached prompts only with those of the same salt
    key: str = ""  # whose request it is: waiting requests of different keys take turns
    timeout: float | None = None  # seconds from submit on

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            raise UserError(f"request: expected either prompt or messages, found {found}")
        if not isinstance(self.params, SamplingParams):
            raise UserError(f"request: params: expected SamplingParams, found {shown(self.params)}")
        if not isinstance(self.template_variables, Mapping):
            raise UserError(f"request: template_variables: expected a mapping, found {shown(self.template_variables)}")
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise UserError(f"request: structure: expected a Structure, found {shown(self.structure)}")
        if self.messages is None and (self.tools or self.template_variables):
            raise UserError("request: tools and template_variables go with messages: a prompt is taken as it is")
        _require_count("n", self.n, 1, MOST_CHOICES)
        if self.best_of is not None:
            _require_count("best_of", self.best_of, self.n, MOST_CHOICES)
        _require_count("num_beams", self.num_beams, 1, MOST_CHOICES)
        if self.num_beams > 1:
            self._check_beams()
        for name, most in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if most is not None:
                _require_count(name, most, 0, MOST_LOGPROBS)
        _require_number("length_penalty", self.length_penalty)
        if self.timeout is not None:
            _require_number("timeout", self.timeout)
            if self.timeout <= 0:
                raise UserError(f"request: timeout={self.timeout} must be more than 0 seconds")
        check_limit(self.lookup)
        check_limit(self.draft, "draft")
        if self.lookup and self.draft:
            raise UserError(f"request: lookup={self.lookup} goes with no draft={self.draft}: give one of them")
        for name, text in (("salt", self.salt), ("key", self.key)):
            if not isinstance(text, str) or len(text) > MOST_KEY:
                raise UserError(f"request: {name}: expected at most {MOST_KEY} characters, found {shown(text)}")

    def _check_beams(self) -> None:
        other = [
            name
            for name, given in (
                ("best_of", self.best_of is not None),
                ("lookup", self.lookup > 0),
                ("draft", self.draft > 0),
                ("structure", self.structure is not None),
                ("logprobs", self.logprobs is not None),
                ("params.temperature", self.params.temperature != 0),
                *((f"params.{name}", getattr(self.params, name) != getattr(_PLAIN, name)) for name in _CHANGES_LOGITS),
            )
            if given
        ]
        if other:
            raise UserError(
                f"request: num_beams={self.num_beams} goes with no {other[0]}: beam search compares the model's own "
                "probabilities"
            )
        if self.n > self.num_beams:
            raise UserError(f"request: n={self.n} answers, but num_beams={self.num_beams}; ask for as many beams")


@dataclass(frozen=True)
class Delta:
    """What is new in one of a request's answers. Texts join to the whole; a tool call comes once its JSON is whole."""

    choice: int = 0
    thought: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[int, ...] = ()  # their texts may still be held back: half a character, the beginning of a stop string
    logprobs: tuple[TokenLogprobs, ...] = ()  # of these tokens, where they were asked for
    finish_reason: FinishReason | None = None  # in an answer's last delta
    stop: str | int | None = None  # what ended it: a stop string, or a stop token's id

    def joined(self, later: Delta) -> Delta:
        """This and the next one of the same answer as one."""
        return Delta(
            self.choice,
            self.thought + later.thought,
            self.content + later.content,
            self.tool_calls + later.tool_calls,
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.stop,
        )


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: all its answers' together, those that weren't chosen of ``best_of`` included."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt's: not computed again
    completion_tokens: int  # stop tokens are not counted
    drafted_tokens: int = 0  # guesses of prompt lookup or a draft bundle
    accepted_tokens: int = 0  # those that proved right

    def __add__(self, other: Usage) -> Usage:
        """Of several requests together."""
        return Usage(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Timing:
    """Seconds from submit on; None for what hasn't happened."""

    started: float | None = None  # it left the queue
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer: one Delta per choice, by index, and what it took."""

    choices: tuple[Delta, ...]
    usage: Usage
    timing: Timing
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # None for the first token: nothing is before it


def _require_count(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"request: {name}: expected a whole number from {least} to {most}, found {shown(value)}")


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise UserError(f"request: {name}: expected a finite number, found {shown(value)}")
