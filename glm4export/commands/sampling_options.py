"""Options of the commands that show answers, and the sampling parameters that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm4runtime.sampling import SamplingParams

_OFF = "default: %(default)s, which is off"


def add_answer_options(command: argparse.ArgumentParser, *, max_new_tokens: int = 256) -> None:
    """Options of commands that show a model's answers."""
    command.add_argument("--system", metavar="TEXT", help="system message")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before TEXT; may be given again"
    )
    command.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the bundle's own"
    )
    _add_sampling_options(command, max_new_tokens)
    command.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="guess up to N tokens per step where the text repeats itself: faster (try 7)",
    )
    command.add_argument(
        "--adapter", type=Path, metavar="FILE", help="of `glm4export adapter`, for a bundle built with --lora-slots"
    )


def _add_sampling_options(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """One option for each field of ``SamplingParams`` that makes sense without token ids."""
    command.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--min-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help="no stop token before N tokens (default: %(default)s)",
    )
    command.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s, which is greedy")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help=_OFF)
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help=_OFF)
    command.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help=f"leave out tokens below P times the most probable one's probability ({_OFF})",
    )
    command.add_argument(
        "--typical-p",
        type=float,
        default=1.0,
        metavar="P",
        help=f"keep the tokens nearest to the expected surprise, together of probability P ({_OFF})",
    )
    command.add_argument(
        "--xtc-probability",
        type=float,
        default=0.0,
        metavar="P",
        help=f"so often, leave out all likely tokens but the least likely of them ({_OFF})",
    )
    command.add_argument(
        "--xtc-threshold", type=float, default=0.1, metavar="P", help="what likely means there (default: %(default)s)"
    )
    command.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help=f"for tokens in prompt and answer; above 1 repeats less ({_OFF})",
    )
    command.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help=f"subtracted from the logits of the answer's tokens, -2 to 2 ({_OFF})",
    )
    command.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help=f"the same times how often they came, -2 to 2 ({_OFF})",
    )
    command.add_argument(
        "--no-repeat-ngram-size", type=int, default=0, metavar="N", help=f"no N tokens in a row come twice ({_OFF})"
    )
    command.add_argument("--seed", type=int, help="the same seed gives the same text")


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The parameters that the options ask for; raises UserError for values out of range."""
    from glm4runtime import SamplingParams

    return SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        min_p=arguments.min_p,
        typical_p=arguments.typical_p,
        xtc_probability=arguments.xtc_probability,
        xtc_threshold=arguments.xtc_threshold,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
    )
