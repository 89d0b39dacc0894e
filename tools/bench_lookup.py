"""Prompt lookup beside plain decoding, on a code edit, a summary, and a text that doesn't repeat itself.

    python tools/make_checkpoint.py out/slice --geometry glm-4-9b --layers 10
    glm4export build out/slice -o out/slice-int4 --precision int4 --head-bits 4 --max-seq-len 4096
    python tools/bench_lookup.py out/slice-int4

The answers are given, not the model's: at each step the next token of the answer takes the place of the chosen one, and
a guess is accepted where it equals it. So the speed is that of a model which gives these answers, and random weights
do. Words are tokens, about as GLM-4's tokenizer cuts English. "invariant" pads runs, as ``load(..., invariant=True)``
does (see glm4runtime/backends/invariance.py). Rounds of the four ways are interleaved in one process, and medians of
the rounds' ratios printed: machines are noisy. What a run over several tokens costs is printed first: it bounds the
ratio, and grows where other programs use the machine's arithmetic.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from glm4export.sources.checkpoint import locate
from glm4runtime import Session, load
from glm4runtime.backends.invariance import find_granule
from glm4runtime.lookup import PromptLookup
from glm4runtime.speculation import Counts, Speculation

REPOSITORY = Path(__file__).resolve().parent.parent
WIDTHS = (2, 4, 8, 16)
Case = tuple[list[int], list[int]]  # prompt and answer


def cases(limit: int) -> dict[str, Case]:
    """Token ids of prompts and answers, the answers of ``limit`` tokens at most."""
    code = (REPOSITORY / "runtime/glm4runtime/backends/cache.py").read_text(encoding="utf-8")
    edited = code.replace("address", "pointer").replace("bind_input", "attach_input").replace("device", "place")
    documents = (locate(None).folder / "heldout.txt").read_text(encoding="utf-8").split("\n\n")
    sentences = re.split(r"(?<=[.;]) ", " ".join(documents[:4]))
    texts = {
        "code edit": (code, edited),
        "summary": (" ".join(sentences), " ".join(sentences[1::3])),
        "new text": (documents[0], " ".join(documents[5:12])),
    }
    ids: dict[str, int] = {}
    return {name: (tokens(prompt, ids), tokens(answer, ids)[:limit]) for name, (prompt, answer) in texts.items()}


def tokens(text: str, ids: dict[str, int]) -> list[int]:
    """A token for each word with the space before it, punctuation mark and indentation."""
    return [ids.setdefault(piece, 100 + len(ids)) for piece in re.findall(r" ?\w+|[^\w\s]|\s+", text)]


def seconds(decode: Callable[[int], np.ndarray], answer: list[int]) -> float:
    """Time to take the answer in token by token, choosing from the logits as greedy decoding does."""
    start = time.perf_counter()
    for token in answer:
        int(decode(token).argmax())
    return time.perf_counter() - start


def four_ways(session: Session, case: Case, limit: int, granule: int) -> tuple[list[float], Counts]:
    """One round: seconds plain, with guesses, and both with padded runs; and what became of the guesses."""
    (prompt, answer), runner = case, session.runner
    found = []
    for width in (1, granule):
        runner.granule = width
        for most in (0, limit):
            runner.rewind(len(prompt))
            lookup = Speculation(runner, PromptLookup(prompt, most))
            found.append(seconds(lookup.decode, answer))
    runner.granule = 1
    return found, lookup.counts


def costs(session: Session, rounds: int) -> dict[int, float]:
    """Cost of one run over several tokens, in runs over one."""
    runner = session.runner
    times: dict[int, list[float]] = {width: [] for width in (1, *WIDTHS)}
    for _ in range(rounds + 1):
        for width, collected in times.items():
            start = time.perf_counter()
            runner.verify([100] * width)
            collected.append(time.perf_counter() - start)
    ratios = {width: [a / b for a, b in zip(times[width][1:], times[1][1:], strict=True)] for width in WIDTHS}
    return {width: statistics.median(values) for width, values in ratios.items()}


def ratios(values: Iterable[float]) -> str:
    """Median and range."""
    found = sorted(values)
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--lookup", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: onnxruntime's choice")
    arguments = parser.parse_args()

    session = load(arguments.bundle, threads=arguments.threads)
    runner, vocab_size = session.runner, session.manifest.vocab_size
    granule = find_granule(runner)
    if granule is None:
        raise SystemExit("no granule on this machine: nothing to compare with")
    print(f"granule {granule}")
    for name, (prompt, answer) in cases(arguments.tokens).items():
        case = [token % vocab_size for token in prompt], [token % vocab_size for token in answer]
        runner.rewind()
        runner.prefill(case[0])
        if name == "code edit":
            cost = costs(session, 3 * arguments.rounds)
            print("cost of a run in runs over one token:", *(f"{width}: {cost[width]:.2f}" for width in WIDTHS))
            print("            prompt  answer   plain  lookup  invariant  with lookup tok/s; over plain: ", end="")
            print("lookup, invariant, invariant with lookup")
        rounds, counts = zip(
            *(four_ways(session, case, arguments.lookup, granule) for _ in range(arguments.rounds)), strict=True
        )
        rates = [len(answer) / statistics.median(times[way] for times in rounds) for way in range(4)]
        over_plain = [ratios(times[0] / times[way] for times in rounds) for way in (1, 2, 3)]
        print(
            f"{name:<10}{len(prompt):8}{len(answer):8}{rates[0]:8.1f}{rates[1]:8.1f}{rates[2]:11.1f}{rates[3]:13.1f}"
            f"    {', '.join(over_plain)}; {counts[-1].accepted} of {counts[-1].drafted} right, {counts[-1].runs} runs"
        )


if __name__ == "__main__":
    main()
