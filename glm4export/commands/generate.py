"""``glm4export generate``: the answer to one prompt."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4export.commands.questions import not_text
from glm4export.commands.rates import Rates
from glm4export.commands.sampling_options import add_answer_options, sampling_params
from glm4export.commands.session_options import add_session_options, load_session
from glm4runtime.contract import UserError

if TYPE_CHECKING:
    from glm4runtime.sampling import SamplingParams
    from glm4runtime.session import Session
    from glm4runtime.text.stop import Stop
    from glm4runtime.text.stream import TextStream

EXAMPLE = 'example: glm4export generate glm4-demo-fp16 --prompt "What is the capital of France?"'


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="one question; - reads it from standard input")
    command.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    add_answer_options(command)
    add_session_options(command)
    command.add_argument("--json", action="store_true", help="print text, reason and timing as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4runtime.speculation import check_limit

    check_limit(arguments.lookup)
    for option, value in (("--system", arguments.system), ("--chat-template", arguments.chat_template)):
        if arguments.raw and value is not None:
            raise UserError(f"{option} needs the chat template; leave out --raw")
    params = sampling_params(arguments)
    adapter = None if arguments.adapter is None else str(arguments.adapter)
    files = None if adapter is None else {adapter: arguments.adapter}
    with load_session(arguments, chat_template=arguments.chat_template, adapters=files) as session:
        answer(
            session,
            read_prompt() if arguments.prompt == "-" else arguments.prompt,
            params,
            raw=arguments.raw,
            system=arguments.system,
            as_json=arguments.json,
            lookup=arguments.lookup,
            stop=arguments.stop,
            adapter=adapter,
        )
    return 0


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
    adapter: str | None = None,
) -> None:
    """Print the text that follows one prompt, as it comes; with ``as_json`` one object at the end."""
    rates, start = Rates(), time.monotonic()
    instructions = [] if system is None else [{"role": "system", "content": system}]
    messages = [*instructions, {"role": "user", "content": prompt}]
    text = prompt if raw else session.template.render(messages)
    stream = session.stream(text, params, lookup=lookup, stop=stop, adapter=adapter)
    first = time.monotonic()
    if as_json:
        print(json.dumps(_summary(stream, stream.read(), first - start, time.monotonic() - first), ensure_ascii=False))
        return
    for piece in stream:
        rates.token()
        print(piece, end="", flush=True)
    print()
    rates.tell(stream.generation, stream.finish_reason)


def read_prompt() -> str:
    """All of standard input. Raises UserError where it isn't text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise not_text(error) from None


def _summary(stream: TextStream, text: str, prefill: float, decode: float) -> dict[str, Any]:
    guesses = stream.generation.lookup
    return {
        "text": text,
        "finish_reason": stream.finish_reason,
        "stop_text": stream.stop_text,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in stream.tool_calls],
        "prompt_tokens": stream.generation.prompt_tokens,
        "reused_tokens": stream.generation.reused_tokens,
        "completion_tokens": stream.generation.completion_tokens,
        "prefill_seconds": round(prefill, 4),
        "decode_seconds": round(decode, 4),
        "lookup": {"runs": guesses.runs, "drafted": guesses.drafted, "accepted": guesses.accepted},
    }
