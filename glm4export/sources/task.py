"""What a checkpoint is to be compiled for: its task, and for heads without a cache, their labels and padding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glm4export.sources.checkpoint import CONFIG
from glm4export.sources.config_json import ARCHITECTURES, config_data
from glm4export.sources.config_keys import ConfigError
from glm4graphs.encoder import Encoding
from glm4runtime.contract import CAUSAL_LM, FEATURES, TOKEN_CLASSIFICATION, EncoderSpec, TaskName, UserError, shown
from glm4runtime.contract.encoder_spec import PROBLEM_TYPES, SINGLE_LABEL, repeated

_DEFAULT_PAD = 151329  # transformers' where config.json has no pad_token_id: GLM-4's own
_MOST_LABELS = 2**20


@dataclass(frozen=True)
class Task:
    """A task, with the head of one that has no cache."""

    name: TaskName
    encoding: Encoding | None = None  # None for a causal language model
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pad: int | None = None  # the token that fills up a batch's texts

    def spec(self, max_seq_len: int) -> EncoderSpec | None:
        """What a manifest says of it."""
        if self.encoding is None:
            return None
        return EncoderSpec(max_seq_len, self.labels, self.problem_type, self.encoding.pooling, self.encoding.normalize)


def wanted_task(folder: Path, wanted: TaskName | Literal["auto"]) -> TaskName | None:
    """The task that a build of the checkpoint will have; None where config.json names no class that is supported."""
    if wanted != "auto":
        return wanted
    found = config_data(folder / CONFIG).get("architectures")
    return next((task for name, task in ARCHITECTURES.items() if found == [name]), None)


def read_task(
    data: dict[str, Any],
    where: str,
    wanted: TaskName | Literal["auto"] = "auto",
    *,
    pooling: str | None = None,
    normalize: bool = False,
    num_labels: int | None = None,
) -> Task:
    """The task of a config.json that :func:`parse_config` took, or the one that is wanted of it, with its labels.

    Labels are read as transformers does; ``num_labels``, of a head that an adapter brings, counts for more than
    config.json's, as it does in ``from_pretrained(num_labels=...)``: names of another number are dropped.

    Raises ConfigError naming key, value and remedy; UserError where the options don't fit the task.
    """
    name = ARCHITECTURES[data["architectures"][0]] if wanted == "auto" else wanted
    if (pooling or normalize) and name != FEATURES:
        option = f"--pooling {pooling}" if pooling else "--normalize"
        raise UserError(f"{option} goes with --task {FEATURES}, not with {name}")
    if normalize and not pooling:
        raise UserError("--normalize needs --pooling last or mean: it makes a text's one embedding 1 long")
    if name == CAUSAL_LM:
        return Task(name)
    if name == FEATURES:
        return Task(name, Encoding(name, pooling=pooling, normalize=normalize), pad=_pad(data))
    labels = _labels(data, where)
    if num_labels is not None and num_labels != len(labels):
        labels = _unnamed(num_labels)
    if name == TOKEN_CLASSIFICATION:
        return Task(name, Encoding(name, len(labels)), labels, pad=_pad(data))
    if twice := repeated(labels):
        raise ConfigError(
            f"{where}: id2label names several labels {shown(twice)}, whose scores nobody could tell apart; give each a "
            "name of its own"
        )
    problem, pad = data.get("problem_type"), _pad(data)
    if problem is not None and problem not in PROBLEM_TYPES:
        raise ConfigError(f"{where}: problem_type={shown(problem)} is not one of {', '.join(PROBLEM_TYPES)}")
    if problem == SINGLE_LABEL and len(labels) == 1:
        raise ConfigError(f"{where}: problem_type={shown(problem)} with one label, of which there is nothing to choose")
    if pad is None and data.get("pad_token_id", _DEFAULT_PAD) is not None:
        found = f"is {shown(data['pad_token_id'])}" if "pad_token_id" in data else "is missing"
        raise ConfigError(
            f"{where}: pad_token_id {found}, expected a token id below vocab_size={data['vocab_size']}: the last token "
            "of a text that isn't padding is the one that is classified; null takes one text at a time"
        )
    return Task(name, Encoding(name, len(labels), pad), labels, problem, pad)


def _labels(data: dict[str, Any], where: str) -> tuple[str, ...]:
    """id2label's texts by number; without it LABEL_0 to num_labels - 1, of which transformers' default is 2."""
    count, names = data.get("num_labels"), data.get("id2label")
    if count is not None and (type(count) is not int or not 1 <= count <= _MOST_LABELS):
        raise ConfigError(f"{where}: num_labels={shown(count)} must be a whole number from 1 to {_MOST_LABELS}")
    if names is None:
        return _unnamed(2 if count is None else count)
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{where}: id2label={shown(names)} must be an object of texts by number")
    labels = {str(key): name for key, name in names.items()}
    if labels.keys() != {str(index) for index in range(len(names))}:
        raise ConfigError(f"{where}: id2label's keys {shown(list(labels))} must be 0 to {len(names) - 1}")
    if count is not None and count != len(names):
        raise ConfigError(f"{where}: num_labels={count}, and id2label has {len(names)}; keep the right one")
    return tuple(labels[str(index)] for index in range(len(names)))


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))


def _pad(data: dict[str, Any]) -> int | None:
    """The token that transformers takes for padding: config.json's own, whatever generation_config.json says."""
    pad = data.get("pad_token_id", _DEFAULT_PAD)
    return pad if type(pad) is int and 0 <= pad < data["vocab_size"] else None
