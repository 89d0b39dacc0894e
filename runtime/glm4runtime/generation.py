"""The generation loop: token ids in, token ids out. Text lives elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from glm4runtime.backends.held_row import HeldSteps, Logits
from glm4runtime.backends.runner import Runner
from glm4runtime.lookup import PromptLookup
from glm4runtime.sampling import Sampler, SamplingParams
from glm4runtime.speculation import Counts, Speculation, check_limit


class Generation(Iterator[int]):
    """An iterator over the tokens that follow a prompt.

    ``finish_reason`` is None while running, then ``stop`` (a stop token came: ``stop_token``, which is not yielded) or
    ``length`` (the token limit, or the end of the cache). One generation at a time: starting another on the same runner
    takes the cache from this one, whose next read raises RuntimeError. A read that is interrupted, by Ctrl-C say,
    changes nothing: the next one gives the token that it would have given.

    ``reused_tokens`` of the prompt's ``prompt_tokens`` were in the cache already, as earlier turns of a conversation
    are, and weren't computed again.
    """

    def __init__(
        self,
        runner: Runner,
        prompt: Sequence[int],
        params: SamplingParams,
        stop: Sequence[int] | None = None,
        lookup: int = 0,
        adapter: str | None = None,
    ) -> None:
        """Prefill the prompt now, as far as the cache doesn't begin with it; each read then decodes one token.

        stop: token ids that end the text, by default the bundle's list. lookup: guess up to this many tokens per run,
        see :mod:`glm4runtime.lookup`. adapter: a LoRA adapter that the runner has. Raises UserError as
        ``Runner.prefill``, for a lookup out of range, for an adapter that isn't there, and for params with a token id
        that the vocabulary lacks; a generation under way on the same runner then goes on undisturbed.
        """
        check_limit(lookup)
        ids = runner.check_prompt(prompt)
        runner.use_adapter(adapter)
        self.prompt_tokens = len(ids)
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self.stop_token: int | None = None
        self._runner = runner
        self._stop = frozenset(runner.manifest.tokens.eos if stop is None else stop)
        self._limit = params.max_new_tokens
        self._sampler = Sampler(params, runner.manifest.vocab_size, prompt=ids, stop=self._stop)
        self.reused_tokens = runner.resume(ids)
        self._epoch = runner.sequence.epoch
        self._logits: Logits = runner.prefill(ids[self.reused_tokens :])
        steps = HeldSteps(runner) if self._sampler.chooses_among(runner.top_count) else runner
        self._lookup: Speculation[Logits] = Speculation(steps, PromptLookup(ids, min(lookup, runner.draft_rows - 1)))
        self._token = -1  # the last one chosen, not yet in the cache

    @property
    def lookup(self) -> Counts:
        """Runs of steps so far, and guesses."""
        return self._lookup.counts

    def __next__(self) -> int:
        if self.finish_reason is not None:
            raise StopIteration
        if self._runner.sequence.epoch != self._epoch:
            raise RuntimeError("another generation was started on this session and took its cache")
        state = self._state()
        try:
            return self._next()
        except StopIteration:
            raise
        except BaseException:
            self._restore(state)
            raise

    def _next(self) -> int:
        if self.completion_tokens == self._limit:
            return self._finish("length")
        if self.completion_tokens:
            if self._runner.length == self._runner.max_seq_len:
                return self._finish("length")
            self._logits = self._lookup.decode(self._token)
        self._token = self._sampler(self._logits)
        if self._token in self._stop:
            self.stop_token = self._token
            return self._finish("stop")
        self.completion_tokens += 1
        return self._token

    def _finish(self, reason: str) -> int:
        self.finish_reason = reason
        raise StopIteration

    def _state(self) -> tuple[Any, ...]:
        progress = (self.completion_tokens, self.finish_reason, self.stop_token, self._token, self._logits)
        return progress, self._sampler.state(), self._lookup.state(), self._runner.sequence.state()

    def _restore(self, state: tuple[Any, ...]) -> None:
        progress, sampler, lookup, runner = state
        self.completion_tokens, self.finish_reason, self.stop_token, self._token, self._logits = progress
        self._sampler.restore(sampler)
        self._runner.sequence.restore(runner)
        self._lookup.restore(lookup, self._runner.sequence.tokens)
