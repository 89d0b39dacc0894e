"""``glm4export generate``: one prompt, or a conversation on the terminal."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from glm4runtime.contract import UserError
from glm4runtime.sampling import SamplingParams
from glm4runtime.session import Session
from glm4runtime.stream import Stop, TextStream


def answer(
    session: Session,
    prompt: str,
    params: SamplingParams,
    *,
    raw: bool,
    system: str | None,
    as_json: bool,
    lookup: int = 0,
    stop: Stop = (),
) -> None:
    """Print the text that follows one prompt, as it comes; with ``as_json`` one object at the end."""
    start = time.monotonic()
    messages = [*_system(system), {"role": "user", "content": prompt}]
    text = prompt if raw else session.template.render(messages)
    stream = session.stream(text, params, lookup=lookup, stop=stop)
    first = time.monotonic()
    if as_json:
        print(json.dumps(_summary(stream, stream.read(), first - start, time.monotonic() - first), ensure_ascii=False))
        return
    _print(stream)
    _timing(stream, first - start, time.monotonic() - first)


def converse(session: Session, params: SamplingParams, *, system: str | None, lookup: int = 0, stop: Stop = ()) -> None:
    """Read questions from standard input and print the answers, until its end; Ctrl-C ends an answer."""
    messages: list[dict[str, Any]] = _system(system)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise _not_text(error) from None
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        stream = session.chat(messages, params, lookup=lookup, stop=stop)
        try:
            _print(stream)
        except KeyboardInterrupt:
            print()
        messages.append({"role": "assistant", "content": stream.text})


def read_prompt() -> str:
    """All of standard input. Raises UserError where it isn't text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _not_text(error) from None


def _not_text(error: UnicodeDecodeError) -> UserError:
    return UserError(f"standard input: not valid {error.encoding} at byte {error.start} of what was read")


def _system(text: str | None) -> list[dict[str, Any]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _print(stream: TextStream) -> None:
    for piece in stream:
        print(piece, end="", flush=True)
    print()


def _timing(stream: TextStream, prefill: float, decode: float) -> None:
    if not sys.stderr.isatty():
        return
    generation = stream.generation
    rates = (
        f"{generation.prompt_tokens} prompt tokens in {prefill:.2f} s, "
        f"{generation.completion_tokens} more at {generation.completion_tokens / max(decode, 1e-9):.1f} tok/s"
    )
    guesses = generation.lookup
    if guesses.drafted:
        rates += f" in {guesses.runs} runs, {guesses.accepted} of {guesses.drafted} guesses right"
    print(f"[{rates}, ended by {stream.finish_reason}]", file=sys.stderr)


def _summary(stream: TextStream, text: str, prefill: float, decode: float) -> dict[str, Any]:
    guesses = stream.generation.lookup
    return {
        "text": text,
        "finish_reason": stream.finish_reason,
        "stop_text": stream.stop_text,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in stream.tool_calls],
        "prompt_tokens": stream.generation.prompt_tokens,
        "completion_tokens": stream.generation.completion_tokens,
        "prefill_seconds": round(prefill, 4),
        "decode_seconds": round(decode, 4),
        "lookup": {"runs": guesses.runs, "drafted": guesses.drafted, "accepted": guesses.accepted},
    }
