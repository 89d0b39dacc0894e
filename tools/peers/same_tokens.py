"""Greedy answers and logits of peers beside transformers in fp32: the proof that their files hold the same model.

    python tools/peers/same_tokens.py glm4export/demo --peers llama.cpp:F32 llama.cpp:BF16

Each prompt is answered greedily by the reference; every peer gets the same prompt and answers for itself. Printed are
the prompts answered with the same tokens and the largest difference of any logit while they agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `peers`, when run as a script

from glm4runtime.text.tokenizer import Tokenizer
from peers.protocol import Worker, interpreters

REFERENCE = "transformers:fp32"
TEXTS = ("What is the capital of France?", "Call me Ishmael. Some years ago,", "12 + 7 =", "The ship", "def f(n):")
Answer = tuple[list[int], list[np.ndarray]]  # tokens, and the logits that each was chosen from


def prompts(checkpoint: Path) -> list[list[int]]:
    """Token ids of a few texts; random ids of several lengths where the checkpoint has no tokenizer."""
    path = checkpoint / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(path)
        return [tokenizer.encode(text) for text in TEXTS]
    vocab = int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    return [np.random.default_rng(length).integers(0, vocab, length).tolist() for length in (1, 5, 16, 33)]


def answer(worker: Worker, prompt: list[int], steps: int, path: Path) -> Answer:
    """The greedy continuation."""
    worker.ask("start", ids=prompt, save=str(path))
    tokens, rows = [], [np.load(path)]
    for _ in range(steps):
        tokens.append(int(rows[-1].argmax()))
        worker.ask("decode", ids=tokens[-1:], save=str(path))
        rows.append(np.load(path))
    return tokens, rows


def compare(wanted: Answer, found: Answer) -> tuple[int | None, float]:
    """Where the tokens part (None: nowhere), and the largest logit difference until then."""
    pairs = enumerate(zip(wanted[0], found[0], strict=True))
    parts = next((index for index, (theirs, ours) in pairs if theirs != ours), None)
    same = len(wanted[1]) if parts is None else parts + 1  # rows up to there have the same history
    differences = (np.abs(a - b).max() for a, b in zip(wanted[1][:same], found[1][:same], strict=True))
    return parts, float(max(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peers", nargs="+", default=["llama.cpp:F32"], metavar="PEER", help="default: llama.cpp:F32")
    parser.add_argument("--steps", type=int, default=32, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="on a busy machine more is slower (default: 1)")
    parser.add_argument("--work", type=Path, help="folder for peers' files (default: a temporary one)")
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="KIND=PATH", help="another interpreter for a kind of peer"
    )
    arguments = parser.parse_args()
    texts = prompts(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--checkpoint", str(arguments.checkpoint.resolve()), "--threads", str(arguments.threads)]
        options += ["--work", str((arguments.work or Path(folder)).resolve())]
        wanted: list[Answer] = []
        for spec in [REFERENCE, *arguments.peers]:
            for worker in Worker.open_all([spec], interpreters(arguments.python), options).values():
                found = [answer(worker, prompt, arguments.steps, Path(folder) / "logits.npy") for prompt in texts]
                worker.close()
                report(spec, wanted or found, found)
                wanted = wanted or found


def report(spec: str, wanted: list[Answer], found: list[Answer]) -> None:
    """One line for a peer."""
    results = [compare(*pair) for pair in zip(wanted, found, strict=True)]
    same = sum(parts is None for parts, _ in results)
    largest = max(difference for _, difference in results)
    steps = len(found[0][0])
    print(f"{spec}: {same} of {len(found)} answers of {steps} tokens equal; max |diff| {largest:.2e}")


if __name__ == "__main__":
    main()
