"""Fields that chat and completions share, and what the engine is given for them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from glm4runtime.contract import UserError
from glm4runtime.sampling import SamplingParams
from glm4serve.schema import Items, Strict

StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False  # one more event, with the tokens
    include_obfuscation: Literal[False] = False


class PassedOver(Strict):
    """Fields of OpenAI's that change no answer here: they are taken and have no effect."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class SamplingFields(PassedOver):
    """OpenAI's, then those of vLLM and llama.cpp. None is the default."""

    model: str | None = Field(None, max_length=256)
    n: int | None = Field(None, ge=1, le=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[Items[StopString], Field(max_length=16)] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)

    top_k: int | None = Field(None, ge=-1)  # 0 and -1 turn it off
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    dry_multiplier: float | None = Field(None, ge=0)
    dry_base: float | None = Field(None, ge=1)
    dry_allowed_length: int | None = Field(None, ge=1)
    dry_sequence_breakers: Items[int] | None = Field(None, max_length=256)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Items[int] | None = Field(None, max_length=64)
    cache_salt: str | None = Field(None, max_length=256)

    @property
    def streams(self) -> bool:
        """Whether events are wanted."""
        return bool(self.stream)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, max_new_tokens: int) -> SamplingParams:
        """How tokens are chosen. Raises UserError for values that don't go together."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _AS_THEY_ARE}
        given["min_new_tokens"] = self.min_tokens
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            given["seed"] = self.seed % (1 << 63)  # OpenAI's may be negative
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        known = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_new_tokens=max_new_tokens, **{"temperature": 1.0, **known})

    def stops(self) -> list[str | int]:
        """Strings and token ids that end an answer."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [*strings, *(self.stop_token_ids or [])]


_AS_THEY_ARE = (
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "min_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_sequence_breakers",
)


def _token_id(key: str) -> int:
    if not key.isdecimal() or len(key) > 10:
        raise UserError(f"logit_bias: expected token ids as keys, found {key[:40]!r}")
    return int(key)
