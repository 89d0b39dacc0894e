"""lm-evaluation-harness over a bundle: a model class of ours for its tasks.

``python -m glm4export.evaluation run --model glm4export --model_args bundle=DIR --tasks ...`` is the harness's own
command line with that model known to it. In Python, give :class:`BundleLM` to ``lm_eval.simple_evaluate``.

The harness encodes a context and its continuation together and scores the continuation's tokens
(``lm_eval.api.model.TemplateLM``); this class computes their log-probabilities by :mod:`glm4runtime.scoring`. It needs
the extra ``harness``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from glm4runtime import SamplingParams, Session, load, scoring
from glm4runtime.contract import UserError

_MAX_NEW_TOKENS = 256  # where a task doesn't say, as the harness's own models


@register_model("glm4export")
class BundleLM(TemplateLM):
    """A bundle as the harness's model; texts longer than the cache lose their beginning, as with its own models."""

    def __init__(self, bundle: str | Path, *, provider: Any = None, threads: int = 0, **rest: Any) -> None:
        """Open the bundle; arguments as :func:`glm4runtime.load`'s.

        rest: what the harness gives every model (``batch_size``, ``device`` and the like), which mean nothing here.
        Raises UserError for others.
        """
        super().__init__()
        if unknown := rest.keys() - {"batch_size", "max_batch_size", "device"}:
            raise UserError(f"model_args: {', '.join(sorted(unknown))} is not known; known: bundle, provider, threads")
        self.session: Session = load(bundle, provider=provider, threads=threads)

    @property
    def eot_token_id(self) -> int:
        """The token in front of a text without context: the bundle's first stop token, <|endoftext|>."""
        return self.session.manifest.tokens.eos[0]

    @property
    def max_length(self) -> int:
        """Tokens that the cache holds."""
        return self.session.runner.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and template apart in the harness's cache of requests."""
        return str(self.session.folder.resolve())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; nothing is added to it."""
        return self.session.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the bundle's template writes it. Raises UserError where the template fails."""
        return self.session.template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        return [
            self._score(context, continuation)
            for _, context, continuation in tqdm(requests, desc="loglikelihood", disable=disable_tqdm or None)
        ]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        room = self.max_length + 1 - len(continuation)  # the last token is never run
        if room < 1:
            raise UserError(f"a continuation of {len(continuation)} tokens; the cache holds {self.max_length}")
        found = scoring.score(self.session.runner, context[-room:], continuation)
        return found.log_probability, found.greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as the cache."""
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm or None):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the bundle writes behind each context, until a stop string or the task's number of tokens."""
        return [
            self._generate(*request.args)
            for request in tqdm(requests, desc="generate_until", disable=disable_tqdm or None)
        ]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        count = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _MAX_NEW_TOKENS)
        count = min(count, self.max_length - 1)
        temperature = options.get("temperature")
        params = SamplingParams(
            max_new_tokens=count,
            temperature=float(1.0 if temperature is None else temperature) if options.get("do_sample") else 0.0,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
            seed=options.get("seed"),
        )
        prompt = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        return self.session.stream(prompt, params, stop=[until] if isinstance(until, str) else until).read()
