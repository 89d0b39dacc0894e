"""Log-probabilities in chat's form and in completions'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4runtime.sampling.logprobs import TokenLogprobs
    from glm4runtime.text.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI's API gives for impossible tokens: JSON has no infinity


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text; as ``bytes:\xf0\x9f`` where it is part of a character, as OpenAI's completions show it."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def for_chat(tokenizer: Tokenizer, scored: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Of all tokens that came, those of thoughts and calls too."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": max(logprob, _LEAST),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in scored
    ]
    return {"content": content, "refusal": None}


class Offsets:
    """Where tokens begin in a text, in characters; a character's second half begins where the character does."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0, *, special: bool = False) -> None:
        """start: characters in front. special: special tokens are part of the text."""
        self._decoder = tokenizer.stream(skip_special_tokens=not special)
        self._at = start

    def push(self, token: int) -> int:
        """Where it begins."""
        began = self._at
        self._at += len(self._decoder.push(token))
        return began


def for_completions(
    tokenizer: Tokenizer, tokens: Sequence[int], scored: Sequence[TokenLogprobs | None], offsets: Offsets
) -> dict[str, Any]:
    """tokens: those of ``scored``, which is None for a prompt's first one: nothing is before it."""
    top: list[dict[str, float] | None] = []
    for one in scored:
        if one is None:
            top.append(None)
            continue
        # The token itself is always among them, as OpenAI has it.
        best = dict(one.top) | {one.token: one.logprob}
        top.append({token_text(tokenizer, token): max(logprob, _LEAST) for token, logprob in best.items()})
    return {
        "tokens": [token_text(tokenizer, token) for token in tokens],
        "token_logprobs": [None if one is None else max(one.logprob, _LEAST) for one in scored],
        "top_logprobs": top,
        "text_offset": [offsets.push(token) for token in tokens],
    }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The completions' form of two texts, one behind the other."""
    return {key: first[key] + second[key] for key in first}
