"""Accuracy of llama.cpp's file types and of bundles against transformers in fp32, on the same text.

    python tools/peers/quality.py glm4export/demo --bundle out/demo-int4 --windows 8

Teacher-forced over windows of a text: perplexity, KL divergence from the reference (nats), and how often the most
probable token is the reference's, beside the bits that a weight takes. Peers run one after another, each in its own
process; the reference's logits wait in a temporary folder. Bits are those stored for a weight, scales and zero points
included: of the blocks' matrices, the output head, the embedding, and of all three together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `peers`, when run as a script

from glm4runtime.text.tokenizer import Tokenizer
from peers.protocol import Worker, interpreters

PEERS = ("llama.cpp:Q8_0", "llama.cpp:Q4_0", "llama.cpp:Q4_0-pure", "llama.cpp:Q4_K_S", "llama.cpp:Q4_K_M")
REFERENCE = "transformers:fp32"


@dataclass(frozen=True)
class Row:
    """One line of the table. Bits are per weight; NaN where a format doesn't tell."""

    name: str
    block_bits: float
    head_bits: float
    embedding_bits: float
    all_bits: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    top1: float


def text_windows(checkpoint: Path, text: Path | None, count: int, size: int) -> np.ndarray:
    """Token ids of the first windows of a text, [count, size]; random ids where the checkpoint has no tokenizer."""
    tokenizer, text = checkpoint / "tokenizer.json", text or checkpoint / "heldout.txt"
    if not tokenizer.is_file() or not text.is_file():
        vocab = int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        print(f"no {tokenizer.name} or no text: windows of random ids, whose perplexity says nothing", file=sys.stderr)
        return np.random.default_rng(0).integers(0, vocab, (count, size))
    ids = Tokenizer.from_file(tokenizer).encode(text.read_text(encoding="utf-8"))
    count = min(count, len(ids) // size)
    if not count:
        raise SystemExit(f"{text}: shorter than one window of {size} tokens")
    return np.array(ids[: count * size]).reshape(count, size)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[n, vocab] in float64: the differences of interest are small."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


class Score:
    """What is summed up over the windows of one peer."""

    def __init__(self) -> None:
        self._losses: list[np.ndarray] = []
        self._divergences: list[np.ndarray] = []
        self._agreements: list[np.ndarray] = []

    def add(self, ids: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> None:
        """One window's ids [n] and its log probabilities, the reference's and the peer's, [n, vocab]."""
        self._losses.append(-found[np.arange(len(ids) - 1), ids[1:]])
        self._divergences.append((np.exp(wanted) * (wanted - found)).sum(axis=-1))
        self._agreements.append(wanted.argmax(axis=-1) == found.argmax(axis=-1))

    def row(self, name: str, told: dict[str, object]) -> Row:
        """The finished line."""
        groups: dict[str, tuple[int, int]] = told["groups"]  # type: ignore[assignment]
        divergences = np.concatenate(self._divergences)
        return Row(
            name,
            _bits(groups, "blocks"),
            _bits(groups, "head"),
            _bits(groups, "embedding"),
            _bits(groups, "blocks", "head", "embedding"),
            float(np.exp(np.concatenate(self._losses).mean())),
            float(divergences.mean()),
            float(np.quantile(divergences, 0.99)),
            float(np.concatenate(self._agreements).mean()),
        )


def _bits(groups: dict[str, tuple[int, int]], *wanted: str) -> float:
    sizes, counts = zip(*(groups.get(group, (0, 0)) for group in wanted), strict=True)
    return 8 * sum(sizes) / sum(counts) if any(counts) else float("nan")


def score(worker: Worker, name: str, windows: np.ndarray, folder: Path) -> Row:
    """Run every window; the reference's own run leaves its logits in ``folder`` for the others."""
    total = Score()
    for number, ids in enumerate(windows):
        reference = folder / f"window-{number}.npy"
        path = folder / "found.npy" if reference.is_file() else reference
        worker.ask("every", ids=ids.tolist(), save=str(path))
        wanted = log_softmax(np.load(reference))
        total.add(ids, wanted, wanted if path == reference else log_softmax(np.load(path)))
    return total.row(name, worker.told)


def print_table(rows: list[Row]) -> None:
    """One line per peer."""
    width = max(len(row.name) for row in rows)
    print(f"{'':<{width}}    bits of                              mean KL    p99 KL    top-1")
    print(f"{'':<{width}}  blocks  head embed.   all  perplexity      nats      nats        %")
    for row in rows:
        bits = (row.block_bits, row.head_bits, row.embedding_bits, row.all_bits)
        print(
            f"{row.name:<{width}}  {''.join(f'{value:>6.2f}' for value in bits)}"
            f"{row.perplexity:>12.4f}{row.mean_kl:>10.6f}{row.p99_kl:>10.6f}{100 * row.top1:>9.2f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, nargs="*", default=[], help="bundles built from the checkpoint")
    parser.add_argument("--peers", nargs="*", default=PEERS, metavar="PEER", help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: the checkpoint's heldout.txt)")
    parser.add_argument("--windows", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--window-size", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for peers' files (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="KIND=PATH", help="another interpreter for a kind of peer"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    windows = text_windows(arguments.checkpoint, arguments.text, arguments.windows, arguments.window_size)
    bundles = [f"glm4export:{bundle.resolve()}" for bundle in arguments.bundle]
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work and arguments.work.parent) as folder:
        work = arguments.work.resolve() if arguments.work else Path(folder)
        options = ["--checkpoint", str(arguments.checkpoint.resolve()), "--work", str(work)]
        options += ["--threads", str(arguments.threads), "--context", str(arguments.window_size)]
        for spec in [REFERENCE, *bundles, *arguments.peers]:
            for worker in Worker.open_all([spec], interpreters(arguments.python), options).values():
                name = Path(spec.partition(":")[2]).name if spec in bundles else spec
                rows.append(score(worker, name, windows, Path(folder)))
                worker.close()
            if not rows:
                raise SystemExit("the reference cannot run here")
    print(f"{windows.size} tokens in {len(windows)} windows of {windows.shape[1]}\n")
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
