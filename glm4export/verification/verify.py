"""Compare a bundle with the PyTorch definition in fp32, over the phases of :mod:`glm4export.verification.phases`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from glm4export.calibration.streamed import Text, reference_logits
from glm4export.sources.checkpoint import CONFIG, Checkpoint, locate
from glm4export.sources.config_json import read_config
from glm4export.sources.ledger import classifier_head
from glm4export.sources.lora import merged, recorded
from glm4export.sources.quantized.checkpoint import open_checkpoint
from glm4export.verification.phases import PHASES, Run, run_phases
from glm4export.weights.storage import SCORE
from glm4graphs.encoder import Encoding
from glm4runtime.contract import Manifest, UserError
from glm4runtime.session import Session


@dataclass(frozen=True)
class Thresholds:
    """What a bundle must keep to; the defaults by precision are in :data:`THRESHOLDS`."""

    mean_kl: float  # nats, in each phase
    # Share of positions whose most probable token is the reference's, over all phases together: where a phase has six,
    # two tokens that are equally probable would count as much as a fault.
    top1: float


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


INT8_CACHE = Thresholds(mean_kl=1e-2, top1=0.96)  # as int8 weights: it bounds the precisions that are closer than that


# Share of an int8 cache's values that may be at the ends of its range: past it, values are cut off. The embedded model,
# calibrated on its prose, has 0.03% there over verify's texts; with its steps halved 2.2% or more, which int4's marks
# alone might let pass.
CLIPPED = 0.005


def thresholds_of(manifest: Manifest) -> Thresholds:
    """The defaults for a bundle: its precision's, or the int8 cache's where those are stricter."""
    own = THRESHOLDS[manifest.precision]
    if manifest.cache.dtype != "int8":
        return own
    return Thresholds(max(own.mean_kl, INT8_CACHE.mean_kl), min(own.top1, INT8_CACHE.top1))


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
    cache_dtype: str
    target: str
    phases: tuple[Phase, ...]
    cache_clipped: float | None  # of an int8 cache: the share of its values at the ends of its range
    greedy: tuple[Parting, ...]
    left_out: tuple[str, ...]  # phases that were not run, and why
    failures: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)


def verify(
    session: Session,
    *,
    checkpoint: str | None = None,
    adapters: Sequence[str] = (),
    prompts: Sequence[str] = (),
    steps: int = 32,
    long: bool = False,
    thresholds: Thresholds | None = None,
) -> Report:
    """Run the bundle greedily over several texts and compare every logit with the fp32 reference's.

    checkpoint: folder or hub id; needed where the bundle doesn't say where it came from. adapters: those merged into
    it, each DIR[:SCALE], where it doesn't say where they came from. steps: decode steps per prompt. long: also fill the
    cache to its last row; as slow as prefilling that many tokens in fp32.
    Raises UserError where the checkpoint isn't the one that the bundle was built from.
    """
    if steps < 0:
        raise UserError(f"steps={steps} must be at least 0")
    manifest = session.manifest
    source = open_source(manifest, checkpoint, adapters)
    config = read_config(session.folder / CONFIG)  # the checkpoint's own, or with the rope that the build was asked for
    runs, left_out = run_phases(session, prompts, steps, long)
    with tqdm(total=config.num_hidden_layers, desc="  reference", unit=" layers", leave=False, disable=None) as bar:
        wanted = reference_logits(config, source, [run.text for run in runs], bar.update)
    phases = tuple(_phases(runs, wanted))
    greedy = tuple(
        _parting(run.prompt, run.text, rows) for run, rows in zip(runs, wanted, strict=True) if run.prompt is not None
    )
    clipped = _clipped(runs)
    return Report(
        precision=manifest.precision,
        cache_dtype=manifest.cache.dtype,
        target=manifest.target,
        phases=phases,
        cache_clipped=clipped,
        greedy=greedy,
        left_out=left_out,
        failures=_failures(phases, clipped, thresholds or thresholds_of(manifest)),
    )


def table(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [f"{'phase':<14}{'positions':>10}{'max |Δ|':>11}{'mean |Δ|':>11}{'mean KL':>11}{'top-1':>9}"]
    for phase in report.phases:
        figures = f"{phase.max_abs:>11.2e}{phase.mean_abs:>11.2e}{phase.mean_kl:>11.2e}{phase.top1:>9.2%}"
        lines.append(f"{phase.name:<14}{phase.positions:>10}{figures}")
    count, share = agreement(report.phases)
    lines.append(f"{'all':<14}{count:>10}{share:>42.2%}")
    if report.cache_clipped is not None:
        lines += ["", f"int8 cache: {report.cache_clipped:.2%} of its values are at the ends of its range"]
    lines.append("")
    for parting in report.greedy:
        parts_at = parting.parts_at  # later ones may be equal again, given the bundle's own
        same = "all" if parts_at is None else f"the first {parts_at} of" if parts_at else "not even the first of"
        lines.append(f"{parting.prompt[:40]!r}: {same} {parting.tokens} greedy tokens equal")
    lines += ["", *(f"left out: {reason}" for reason in report.left_out)] if report.left_out else []
    lines += ["", *(f"FAILED: {failure}" for failure in report.failures)]
    count = len(report.failures)
    lines.append("passed" if not count else f"{count} check{'s' * (count > 1)} failed")
    return "\n".join(lines)


def open_source(manifest: Manifest, given: str | None, adapters: Sequence[str]) -> Checkpoint:
    """The checkpoint that a bundle was built from. Raises UserError where it isn't known, or another one is given."""
    source = manifest.source
    if given is not None:
        folder = locate(given).folder
    elif "embedded" in source:
        folder = locate(None).folder
    elif "repo_id" in source:
        folder = locate(source["repo_id"], revision=source["commit"]).folder
    else:
        raise UserError("the bundle was built from a local folder; name it with --checkpoint FOLDER")
    checkpoint = open_checkpoint(folder)
    if checkpoint.fingerprint() != source.get("fingerprint"):
        raise UserError(f"{folder}: not the checkpoint that this bundle was built from (config or tensors differ)")
    config = read_config(folder / CONFIG)
    brought = {}
    if manifest.encoder is not None and SCORE not in checkpoint.tensors:
        brought = classifier_head(config, Encoding(manifest.task, len(manifest.encoder.labels)))
    opened = recorded(source, adapters)
    return merged(checkpoint, opened, tied=config.tie_word_embeddings, brought=brought)


def _phases(runs: Sequence[Run], wanted: Sequence[np.ndarray]) -> Iterator[Phase]:
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run, theirs in zip(runs, wanted, strict=True):
        first = run.text.first
        for name, at, row in run.found:
            pairs.setdefault(name, []).append((row, theirs[at - first]))
    for name in sorted(pairs, key=PHASES.index):
        yield _phase(name, *(np.stack(rows).astype(np.float64) for rows in zip(*pairs[name], strict=True)))


def _clipped(runs: Sequence[Run]) -> float | None:
    """The share over all runs, each counted by its rows."""
    shares = [run.clipped for run in runs if run.clipped is not None]
    return float(np.average(shares, weights=[len(run.tokens) for run in runs])) if shares else None


def _phase(name: str, ours: np.ndarray, theirs: np.ndarray) -> Phase:
    difference = np.abs(ours - theirs)
    return Phase(
        name=name,
        positions=len(ours),
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


def _failures(phases: Sequence[Phase], clipped: float | None, limits: Thresholds) -> tuple[str, ...]:
    failures = []
    for phase in phases:
        if not np.isfinite(phase.max_abs):
            failures.append(f"{phase.name}: logits are not finite")
        if not phase.mean_kl <= limits.mean_kl:
            failures.append(f"{phase.name}: mean KL {phase.mean_kl:.2e} exceeds {limits.mean_kl:.0e}")
    count, share = agreement(phases)
    if not share >= limits.top1:
        failures.append(f"top-1 agreement {share:.2%} over {count} positions is below {limits.top1:.1%}")
    if clipped is not None and not clipped <= CLIPPED:
        failures.append(
            f"int8 cache: {clipped:.2%} of its values are at the ends of its range, over {CLIPPED:.1%}: "
            "calibrate on text like the model's use"
        )
    return tuple(failures)


def agreement(phases: Sequence[Phase]) -> tuple[int, float]:
    """Positions of all phases, and the share of them whose most probable token is the reference's."""
    count = sum(phase.positions for phase in phases)
    return count, sum(round(phase.top1 * phase.positions) for phase in phases) / count
