"""Compare a bundle without a cache with the PyTorch definition in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glm4export.calibration.streamed import Text, hidden_states
from glm4export.sources.checkpoint import CONFIG, Checkpoint
from glm4export.sources.config_json import read_config
from glm4export.verification.phases import PROMPTS
from glm4export.verification.verify import THRESHOLDS, kl_divergence, open_source
from glm4export.weights.storage import SCORE, SCORE_BIAS
from glm4export.weights.tensors import whole
from glm4runtime.backends.token_ids import checked_ids
from glm4runtime.contract import FEATURES, SEQUENCE_CLASSIFICATION, TOKENIZER, UserError
from glm4runtime.encoder import Encoder

# The length of all differences over that of the reference's numbers, at most. The embedded model's hidden states:
# fp32 5e-7, fp16 4e-4, int8 1.5e-2, int4 1.1e-1.
RELATIVE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "fp8": 2e-1, "int8": 5e-2, "int4": 3e-1}
_RANDOM_LENGTHS = (1, 5, 16, 33)  # of texts for a bundle without a tokenizer


@dataclass(frozen=True)
class EncoderReport:
    """What ``glm4export verify`` found."""

    task: str
    precision: str
    target: str
    texts: int
    rows: int  # embeddings, hidden states or logits compared
    max_abs: float
    mean_abs: float
    relative: float  # |all differences| / |all of the reference's numbers|, Euclidean
    mean_kl: float | None  # of classifiers with more than one label: KL(reference || bundle), nats
    top1: float | None  # and the share of rows whose label is the reference's
    failures: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)


def verify_encoder(
    encoder: Encoder,
    *,
    checkpoint: str | None = None,
    adapters: Sequence[str] = (),
    prompts: Sequence[str] = (),
    max_kl: float | None = None,
    min_top1: float | None = None,
) -> EncoderReport:
    """Run the bundle over several texts, in its own batches, and compare every number with the fp32 reference's.

    checkpoint, adapters: as :func:`glm4export.verification.verify.verify`'s. max_kl, min_top1: instead of the
    precision's marks.
    """
    manifest = encoder.manifest
    for option, given in (("--max-kl", max_kl), ("--min-top1", min_top1)):
        if given is not None and len(encoder.spec.labels) < 2:
            raise UserError(f"{option} compares labels, and {encoder.folder} has none to choose from; leave it out")
    source = open_source(manifest, checkpoint, adapters)
    config = read_config(encoder.folder / CONFIG)
    if TOKENIZER in manifest.files:
        tokens = [_token_ids(encoder, text) for text in prompts or PROMPTS]
    elif prompts:
        raise UserError("--prompt needs the bundle to have a tokenizer.json")
    else:
        rng = np.random.default_rng(0)
        lengths = [min(length, encoder.max_seq_len) for length in _RANDOM_LENGTHS]
        tokens = [rng.integers(0, manifest.vocab_size, length).tolist() for length in lengths]
    with tqdm(total=config.num_hidden_layers, desc="  reference", unit=" layers", leave=False, disable=None) as bar:
        hidden = hidden_states(config, source, [Text(ids, 0) for ids in tokens], bar.update)
    theirs = np.concatenate([_wanted(encoder, source, *pair) for pair in zip(tokens, hidden, strict=True)])
    found = _found(encoder, tokens)
    ours = np.concatenate([np.atleast_2d(rows) for rows in found]).astype(np.float64)
    difference = np.abs(ours - theirs)
    relative = float(np.linalg.norm(difference) / np.linalg.norm(theirs))
    kl = top1 = None
    if len(encoder.spec.labels) > 1:
        kl = float(kl_divergence(theirs, ours).mean())
        top1 = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    limits = THRESHOLDS[manifest.precision]
    most, least = limits.mean_kl if max_kl is None else max_kl, limits.top1 if min_top1 is None else min_top1
    failures = []
    if not relative <= RELATIVE[manifest.precision]:
        failures.append(f"relative error {relative:.2e} exceeds {RELATIVE[manifest.precision]:.0e}")
    if kl is not None and not kl <= most:
        failures.append(f"mean KL {kl:.2e} exceeds {most:.0e}")
    if top1 is not None and not top1 >= least:
        failures.append(f"label agreement {top1:.2%} over {len(ours)} rows is below {least:.1%}")
    return EncoderReport(
        task=manifest.task,
        precision=manifest.precision,
        target=manifest.target,
        texts=len(tokens),
        rows=len(ours),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=relative,
        mean_kl=kl,
        top1=top1,
        failures=tuple(failures),
    )


def table(report: EncoderReport) -> str:
    """The report as text for a terminal."""
    lines = [f"{'rows':>6}{'max |Δ|':>11}{'mean |Δ|':>11}{'relative':>11}"]
    lines.append(f"{report.rows:>6}{report.max_abs:>11.2e}{report.mean_abs:>11.2e}{report.relative:>11.2e}")
    if report.mean_kl is not None:
        lines[0] += f"{'mean KL':>11}{'labels':>9}"
        lines[1] += f"{report.mean_kl:>11.2e}{report.top1:>9.2%}"
    lines += [f"FAILED: {failure}" for failure in report.failures]
    return "\n".join([*lines, "failed" if report.failures else "passed"])


def _token_ids(encoder: Encoder, text: str) -> list[int]:
    ids, _ = encoder.tokenizer.encode_text(text, encoder.max_seq_len)
    checked: list[int] = checked_ids(ids, encoder.manifest.vocab_size, f"the prompt {text!r:.80}").tolist()
    return checked[: encoder.max_seq_len]


def _found(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> Sequence[np.ndarray]:
    if encoder.manifest.task != FEATURES:
        return encoder.logits(tokens)
    return encoder.hidden_states(tokens) if encoder.spec.pooling is None else list(encoder.embed(tokens))


def _wanted(encoder: Encoder, source: Checkpoint, tokens: Sequence[int], hidden: Tensor) -> np.ndarray:
    """What transformers makes of a text's hidden states [tokens, hidden]: rows, float64."""
    task, spec = encoder.manifest.task, encoder.spec
    if task == FEATURES:
        if spec.pooling is not None:
            hidden = hidden[-1:] if spec.pooling == "last" else hidden.mean(0, keepdim=True)
        if spec.normalize:
            hidden = torch.nn.functional.normalize(hidden)
        return hidden.double().numpy()
    if task == SEQUENCE_CLASSIFICATION:
        pad = encoder.manifest.tokens.pad
        real = [index for index, token in enumerate(tokens) if pad is None or token != pad]
        last = real[-1] if real else 0
        hidden = hidden[last : last + 1]
    logits = hidden.double() @ _read(source, SCORE).T
    if SCORE_BIAS in source.tensors:
        logits += _read(source, SCORE_BIAS)
    return logits.numpy()


def _read(source: Checkpoint, name: str) -> Tensor:
    return source.read(name, whole(source.tensors[name].shape)).double()
