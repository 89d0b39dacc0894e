"""From one row of logits to one token id.

First processors change logits by the text so far (:mod:`glm4runtime.sampling.chain`), then the largest is taken, or
filters leave some tokens to draw from (:mod:`glm4runtime.sampling.filters`). Names, order and meaning are
transformers' where it has them. What is off costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm4runtime.backends.held_row import HeldRow, Logits
from glm4runtime.contract import UserError
from glm4runtime.sampling.chain import Chain, all_forbidden, check_mask, is_allowed
from glm4runtime.sampling.filters import Filters, Positions, Weights
from glm4runtime.sampling.history import History
from glm4runtime.sampling.params import SamplingParams
from glm4runtime.sampling.rows import Row, most_probable, token_ids
from glm4runtime.sampling.scratch import Scratch


class Sampler:
    """Draws token ids from logits. Build it once, before the loop: it owns its random stream.

    The same parameters, seed, prompt and logits give the same tokens. One sampler serves one sequence at a time.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        prompt: Sequence[int] | NDArray[np.integer[Any]] = (),
        stop: Collection[int] = (),
        scratch: Scratch | None = None,
    ) -> None:
        """prompt: what penalties count beside the answer. stop: the ids that min_new_tokens forbids and XTC spares.
        scratch: memory shared with other samplers of the thread that this one is called in; None: its own.

        Raises UserError for a token id outside the vocabulary.
        """
        self.params = params
        self.vocab_size = vocab_size
        self._forced = token_ids("forced_tokens", params.forced_tokens, vocab_size).tolist()
        scratch = scratch or Scratch(vocab_size)
        self._chain = Chain(params, scratch, stop)
        self._history = History(token_ids("prompt", prompt if self._chain else (), vocab_size))
        self._filters = None if params.temperature == 0 else Filters(params, scratch, stop)
        self._random = np.random.Generator(np.random.PCG64(None if params.seed is None else int(params.seed)))

    def chooses_among(self, count: int) -> bool:
        """Whether a row's ``count`` most probable tokens may be enough to choose from, so that holding rows pays."""
        return count > 1 and not self._chain and (self._filters is None or self._filters.chooses_among(count))

    def __call__(self, logits: Logits, allowed: NDArray[np.uint32] | None = None) -> int:
        """Choose the next token, and take it into the text that penalties count.

        Args:
            logits: float32 [vocab_size]; read only. ``-inf`` forbids a token. Of a row that is held, the token that
                the row would give; it's fetched where its most probable tokens can't tell.
            allowed: uint32 [ceil(vocab_size / 32)], as llguidance fills it: token i may come where bit ``i % 32`` of
                word ``i // 32`` is set. None: any may.

        Raises:
            UserError: the largest logit is NaN or infinite, so there is no distribution to draw from; or params and
                mask together forbid every token.
            ValueError: an array is of another shape or type.
        """
        if isinstance(logits, HeldRow):
            chosen = self._among(logits) if allowed is None else None
            if chosen is not None:
                self._history.append(chosen)
                return chosen
            logits = logits.fetch()
        if logits.shape != (self.vocab_size,) or logits.dtype != np.float32:
            raise ValueError(f"logits: expected float32 [{self.vocab_size}], found {logits.dtype} {list(logits.shape)}")
        best = most_probable(logits)
        if self._history.answered < len(self._forced):
            best = self._forced_token(allowed)
        else:
            if self._chain or allowed is not None:
                logits = self._chain(logits, self._history, allowed)
                best = int(logits.argmax())
                if logits[best] == -np.inf:
                    raise all_forbidden()
            if self._filters is not None:
                ids, weights = self._kept(logits, logits[best])
                drawn = self._filters.draw(weights, self._random.random())
                best = drawn if ids is None else int(ids[drawn])
        self._history.append(best)
        return best

    def record(self, token: int) -> None:
        """Take in a token of the answer that was chosen elsewhere."""
        self._history.append(int(token_ids("token", [token], self.vocab_size)[0]))

    def state(self) -> Any:
        """What :meth:`restore` takes: where the random stream and the text are."""
        return None if self._filters is None else self._random.bit_generator.state, self._history.length

    def restore(self, state: Any) -> None:
        """Go back to where these were."""
        random, self._history.length = state
        if random is not None:
            self._random.bit_generator.state = random
        self._chain.forget()

    def _forced_token(self, allowed: NDArray[np.uint32] | None) -> int:
        token: int = self._forced[self._history.answered]
        if allowed is not None:
            check_mask(allowed, self.vocab_size)
            if not is_allowed(allowed, token):
                raise UserError(f"forced_tokens: token {token} is forbidden here by the mask of a grammar")
        return token

    def _among(self, row: HeldRow) -> int | None:
        """The token that the whole row would give, by its most probable ones alone; None where these can't tell."""
        if self._chain or self._history.answered < len(self._forced) or not np.isfinite(row.log_sum):
            return None
        if self._filters is None:
            best = row.ids[row.values == row.values[0]]
            return int(best.min()) if len(best) < len(row.ids) else None
        kept = self._filters.among(row, self._random.random)
        if kept is None:
            return None
        ids, weights = kept
        return int(ids[self._filters.draw(weights, self._random.random())])

    def _kept(self, logits: Row, top: np.float32) -> tuple[Positions | None, Weights]:
        """Ids that filters leave, ascending (None: all), and their unnormalised probabilities."""
        if self._filters is None:
            return np.array([logits.argmax()]), np.ones(1, np.float32)
        return self._filters.kept(logits, top, self._random.random)
