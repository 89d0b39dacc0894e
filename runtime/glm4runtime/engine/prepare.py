"""A request made ready to be computed: token ids, stop tokens, samplers, parsers, grammars. In the caller's thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.runner import unknown_adapter
from glm4runtime.backends.token_ids import checked_ids
from glm4runtime.contract import UserError
from glm4runtime.engine.beams import BeamGroup
from glm4runtime.engine.handle import Feed
from glm4runtime.engine.job import Answer, Job
from glm4runtime.engine.request import Request, Usage
from glm4runtime.sampling import Sampler, Scratch
from glm4runtime.text.assistant import AnswerParser
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.stop import split_stop, stop_items
from glm4runtime.text.structure import Matcher, Vocabulary, compile_structure
from glm4runtime.text.turn import in_thought


class PromptTooLong(UserError):
    """A prompt of ``tokens`` tokens, or at least so many, where a slot holds ``limit``."""

    def __init__(self, tokens: int, limit: int, *, at_least: bool = False) -> None:
        super().__init__(
            f"the prompt has {'at least ' * at_least}{tokens} tokens, a slot holds {limit}; shorten it, or open or "
            "build the bundle with a larger max_seq_len"
        )
        self.tokens, self.limit = tokens, limit


class Preparation:
    """Makes jobs of requests, from any thread."""

    def __init__(self, runner: BatchRunner, text: BundleText, *, drafts: bool = False) -> None:
        """drafts: whether there is a draft bundle."""
        self._manifest, self._limit, self._slots = runner.manifest, runner.max_seq_len, runner.slots
        self._adapters = runner.adapters
        self._text, self._drafts = text, drafts
        self._scratch = Scratch(self._manifest.vocab_size)  # one thread, the engine's, chooses all tokens
        self._lock = threading.Lock()
        self._made: Vocabulary | None = None

    def job(self, request: Request, now: float) -> Job:
        """Raises UserError for what can't be answered, PromptTooLong among them."""
        manifest = self._manifest
        salt = self._salt(request)
        ids, prompt = self._prompt(request)
        if len(ids) > self._limit:
            raise PromptTooLong(len(ids), self._limit)
        if request.num_beams > self._slots:
            raise UserError(f"request: num_beams={request.num_beams}, and the engine has {self._slots} slots")
        if request.draft and not self._drafts:
            raise UserError(f"request: draft={request.draft}, and the engine has no draft bundle; load it with draft=")
        wants_text = any(isinstance(item, str) for item in stop_items(request.stop))
        tokenizer = self._text.tokenizer if wants_text else None
        stop_ids, strings = split_stop(request.stop, tokenizer, manifest.vocab_size)
        stop = frozenset((*manifest.tokens.eos, *stop_ids))
        matcher = self._matcher(request, prompt)
        count = max(request.n, request.best_of or 0, request.num_beams)
        feed = Feed()
        feed.usage = Usage(len(ids), 0, 0)
        job = Job(request, ids, stop, feed, self._limit, now, salt)
        for index in range(count):
            params = request.params
            if params.seed is not None:
                params = replace(params, seed=params.seed + index)
            sampler = Sampler(params, manifest.vocab_size, prompt=ids, stop=sorted(stop), scratch=self._scratch)
            job.answers.append(Answer(job, index, sampler, self._parser(request, prompt, strings), matcher))
            matcher = None if matcher is None else matcher.copy()  # nothing is consumed yet
        if request.num_beams > 1:
            job.beams = BeamGroup(job)
        return job

    def _salt(self, request: Request) -> str:
        """What cached prompts are told apart by. Raises UserError for an adapter that isn't loaded."""
        name = request.adapter
        if name is None:
            adapter = ""
        elif isinstance(name, str) and name in self._adapters:
            adapter = self._adapters[name]  # not its name: that may be another one's after a restart
        else:
            raise unknown_adapter(name, tuple(self._adapters))
        return f"{adapter}\0{request.salt}"

    def _prompt(self, request: Request) -> tuple[np.ndarray, str | None]:
        """Token ids, int64 [n], and their text where it was one."""
        if request.messages is not None:
            prompt: str | None = self._text.template.render(
                request.messages, request.tools, **dict(request.template_variables)
            )
        elif isinstance(request.prompt, str):
            prompt = request.prompt
        else:
            return checked_ids(request.prompt, self._manifest.vocab_size), None
        self._require_length(prompt or "")
        return checked_ids(self._text.tokenizer.encode(prompt or ""), self._manifest.vocab_size), prompt

    def _require_length(self, prompt: str) -> None:
        """Refuse a prompt that can't fit whatever its tokens are, before they are looked for: that takes long."""
        if len(prompt) > 4 * self._limit and len(prompt) > self._limit * self._text.tokenizer.longest:
            raise PromptTooLong(len(prompt) // self._text.tokenizer.longest, self._limit, at_least=True)

    def _matcher(self, request: Request, prompt: str | None) -> Matcher | None:
        structure = request.structure
        if structure is None:
            return None
        thinking = request.messages is not None and prompt is not None and in_thought(prompt)
        return compile_structure(structure, self._vocabulary, thinking=thinking)

    @property
    def _vocabulary(self) -> Vocabulary:
        with self._lock:  # many threads may ask for the first structured answer, and it's large
            if self._made is None:
                self._made = Vocabulary(self._text.tokenizer, self._manifest.vocab_size, self._manifest.tokens.eos)
            return self._made

    def _parser(self, request: Request, prompt: str | None, strings: list[str]) -> AnswerParser | None:
        if not self._text.has_tokenizer:
            if strings:
                raise UserError(f"stop: {strings[0]!r} is text, and this bundle has no tokenizer; give token ids")
            return None
        if request.messages is None or prompt is None:
            return AnswerParser(self._text.tokenizer, stop_strings=strings, thinking=False)
        return AnswerParser(
            self._text.tokenizer, stop_strings=strings, thinking=in_thought(prompt) or "auto", tools=bool(request.tools)
        )
