"""Compare a bundle with the PyTorch definition in fp32: prefill, every decode step, chunked continuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm4export.checkpoint import CONFIG, Checkpoint, locate
from glm4export.config import read_config
from glm4export.reference import Text, reference_logits
from glm4runtime.contract import Manifest, UserError
from glm4runtime.session import Session

PROMPTS = (
    "What is the capital of France?",
    "Hello, who are you?",
    "12 + 7 =",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "请用中文介绍一下你自己。",
)
_RANDOM_LENGTHS = (1, 5, 16, 33)  # prompts for a bundle without a tokenizer


@dataclass(frozen=True)
class Thresholds:
    """What a bundle must keep to; the defaults by precision are in :data:`THRESHOLDS`."""

    mean_kl: float  # nats
    top1: float  # share of positions whose most probable token is the reference's


# fp32 differs by the order of sums only. fp16 has an 11-bit significand: a mean KL of 1e-3 nats can't be seen in text.
# int8 comes close to that; for int4 the marks are those past which something is wrong, not merely small.
THRESHOLDS = {
    "fp32": Thresholds(mean_kl=1e-6, top1=0.999),
    "fp16": Thresholds(mean_kl=1e-3, top1=0.98),
    "bf16": Thresholds(mean_kl=1e-2, top1=0.95),
    "fp8": Thresholds(mean_kl=5e-2, top1=0.90),
    "int8": Thresholds(mean_kl=1e-2, top1=0.96),
    "int4": Thresholds(mean_kl=2e-1, top1=0.80),
}


@dataclass(frozen=True)
class Phase:
    """How far logits are from the reference's over the positions of one phase."""

    name: str
    positions: int
    max_abs: float
    mean_abs: float
    mean_kl: float  # KL(reference || bundle), nats
    top1: float


@dataclass(frozen=True)
class Parting:
    """Whether the reference, given the same history, would have chosen the same greedy tokens."""

    prompt: str
    tokens: int
    parts_at: int | None  # index of the first token it would have chosen otherwise


@dataclass(frozen=True)
class Report:
    """What ``glm4export verify`` found."""

    precision: str
    target: str
    phases: tuple[Phase, ...]
    greedy: tuple[Parting, ...]
    failures: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)


def verify(
    session: Session,
    *,
    checkpoint: str | None = None,
    prompts: Sequence[str] = (),
    steps: int = 32,
    thresholds: Thresholds | None = None,
) -> Report:
    """Run the bundle greedily over several prompts and compare every logit with the fp32 reference's.

    checkpoint: folder or hub id; needed where the bundle doesn't say where it came from. steps: decode steps a prompt.
    Raises UserError where the checkpoint isn't the one that the bundle was built from.
    """
    if steps < 0:
        raise UserError(f"steps={steps} must be at least 0")
    manifest, runner = session.manifest, session.runner
    source = _open_source(manifest, checkpoint)
    config = read_config(source.folder / CONFIG)
    named = _prompts(session, prompts)
    texts, prefill, decode, continued = [], [], [], []
    for _, ids in named:
        ids = ids[: runner.max_seq_len]
        runner.rewind()
        rows, tokens = [runner.prefill(ids).copy()], list(ids)
        for _ in range(min(steps, runner.max_seq_len - len(ids))):
            tokens.append(int(rows[-1].argmax()))
            rows.append(runner.decode(tokens[-1]).copy())
        prefill.append(rows[:1])
        decode.append(rows[1:])
        texts.append(Text(tokens, first=len(ids) - 1))
        continued.append(_in_two_chunks(session, ids))
    wanted = reference_logits(config, source, texts)
    compared = (
        ("prefill", prefill, [rows[:1] for rows in wanted]),
        ("decode", decode, [rows[1:] for rows in wanted]),
        ("continuation", continued, [rows[:1] for rows in wanted]),
    )
    phases = tuple(_phase(name, ours, theirs) for name, ours, theirs in compared if any(ours))
    greedy = tuple(_parting(name, text, rows) for (name, _), text, rows in zip(named, texts, wanted, strict=True))
    limits = thresholds or THRESHOLDS[manifest.precision]
    return Report(manifest.precision, manifest.target, phases, greedy, _failures(phases, limits))


def table(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [f"{'phase':<14}{'positions':>10}{'max |Δ|':>11}{'mean |Δ|':>11}{'mean KL':>11}{'top-1':>9}"]
    for phase in report.phases:
        figures = f"{phase.max_abs:>11.2e}{phase.mean_abs:>11.2e}{phase.mean_kl:>11.2e}{phase.top1:>9.2%}"
        lines.append(f"{phase.name:<14}{phase.positions:>10}{figures}")
    lines.append("")
    for parting in report.greedy:
        same = f"all {parting.tokens} greedy tokens equal"
        verdict = same if parting.parts_at is None else f"parts at token {parting.parts_at} of {parting.tokens}"
        lines.append(f"{parting.prompt[:40]!r}: {verdict}")
    lines += ["", *(f"FAILED: {failure}" for failure in report.failures)]
    lines.append("passed" if not report.failures else f"{len(report.failures)} checks failed")
    return "\n".join(lines)


def _open_source(manifest: Manifest, given: str | None) -> Checkpoint:
    source = manifest.source
    if given is not None:
        folder = locate(given).folder
    elif "embedded" in source:
        folder = locate(None).folder
    elif "repo_id" in source:
        folder = locate(source["repo_id"], revision=source["commit"]).folder
    else:
        raise UserError("the bundle was built from a local folder; name it with --checkpoint FOLDER")
    checkpoint = Checkpoint.open(folder)
    if checkpoint.fingerprint() != source.get("fingerprint"):
        raise UserError(f"{folder}: not the checkpoint that this bundle was built from (config or tensors differ)")
    return checkpoint


def _prompts(session: Session, given: Sequence[str]) -> list[tuple[str, list[int]]]:
    if given or (session.folder / "tokenizer.json").is_file():
        return [(text, session.tokenizer.encode(text)) for text in given or PROMPTS]
    random = np.random.default_rng(0)
    vocab, longest = session.manifest.vocab_size, session.runner.max_seq_len
    lengths = [length for length in _RANDOM_LENGTHS if length <= longest]
    return [(f"{length} random tokens", random.integers(0, vocab, length).tolist()) for length in lengths]


def _in_two_chunks(session: Session, ids: Sequence[int]) -> list[np.ndarray]:
    """The prompt's last logits, computed in two prefills; nothing for a prompt of one token."""
    if len(ids) < 2:
        return []
    session.runner.rewind()
    session.runner.prefill(ids[: len(ids) // 2])
    return [session.runner.prefill(ids[len(ids) // 2 :]).copy()]


def _phase(name: str, found: list[list[np.ndarray]], wanted: list[np.ndarray]) -> Phase:
    pairs = [
        (row, want) for rows, wants in zip(found, wanted, strict=True) for row, want in zip(rows, wants, strict=False)
    ]
    ours = np.stack([row for row, _ in pairs]).astype(np.float64)
    theirs = np.stack([want for _, want in pairs]).astype(np.float64)
    difference = np.abs(ours - theirs)
    return Phase(
        name=name,
        positions=len(pairs),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        mean_kl=float(kl_divergence(theirs, ours).mean()),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    )


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(other)) in nats, of logits [..., vocab]; computed in float64."""
    p, q = (_log_softmax(np.asarray(logits, dtype=np.float64)) for logits in (reference, other))
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _parting(name: str, text: Text, wanted: np.ndarray) -> Parting:
    chosen = np.asarray(text.tokens[text.first + 1 :])
    differs = np.flatnonzero(wanted[: len(chosen)].argmax(-1) != chosen)
    return Parting(name, len(chosen), int(differs[0]) if len(differs) else None)


def _failures(phases: Sequence[Phase], limits: Thresholds) -> tuple[str, ...]:
    failures = []
    for phase in phases:
        if not np.isfinite(phase.max_abs):
            failures.append(f"{phase.name}: logits are not finite")
        if not phase.mean_kl <= limits.mean_kl:
            failures.append(f"{phase.name}: mean KL {phase.mean_kl:.2e} exceeds {limits.mean_kl:.0e}")
        if not phase.top1 >= limits.top1:
            failures.append(f"{phase.name}: top-1 agreement {phase.top1:.2%} is below {limits.top1:.1%}")
    return tuple(failures)
