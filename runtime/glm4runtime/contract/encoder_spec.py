"""What a bundle without a cache makes of texts: the ``encoder`` of its manifest. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from glm4runtime.contract.errors import UserError
from glm4runtime.contract.json_reader import FieldReader, shown
from glm4runtime.contract.names import (
    CAUSAL_LM,
    FEATURES,
    LAST_HIDDEN_STATE,
    LOGITS,
    SENTENCE_EMBEDDING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    TaskName,
)

POOLINGS = ("last", "mean")
SINGLE_LABEL, MULTI_LABEL, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip
REMEDY: dict[TaskName, str] = {  # by task: what runs a bundle of that kind
    CAUSAL_LM: "open it with glm4runtime.load; on the command line `generate` runs it",
    FEATURES: "open it with glm4runtime.load_encoder; on the command line `embed` runs it",
    SEQUENCE_CLASSIFICATION: "open it with glm4runtime.load_encoder; on the command line `classify` runs it",
    TOKEN_CLASSIFICATION: "open it with glm4runtime.load_encoder; on the command line `classify` runs it",
}


@dataclass(frozen=True)
class EncoderSpec:
    """The head of a bundle without a cache."""

    max_seq_len: int  # tokens that a text may have
    labels: tuple[str, ...] = ()  # of a classifier, in the order of its logits
    problem_type: str | None = None  # of a sequence classifier, one of PROBLEM_TYPES; None where config.json has none
    pooling: str | None = None  # of features, one of POOLINGS; None gives every token's hidden state
    normalize: bool = False  # pooled features have length 1

    @classmethod
    def read(cls, read: FieldReader, task: str) -> EncoderSpec:
        """The same of a manifest. Raises BundleError."""
        labels = read.items("labels", str)
        if (task == FEATURES) == bool(labels):
            expected = "none" if task == FEATURES else "at least one"
            raise read.error(f"labels is {shown(list(labels))}, expected {expected} for {task}")
        if task == SEQUENCE_CLASSIFICATION and (twice := repeated(labels)):
            raise read.error(f"labels has {shown(twice)} more than once, and scores go by label")
        problem = read.one_of("problem_type", PROBLEM_TYPES) if read.optional("problem_type", str) else None
        pooling = read.one_of("pooling", POOLINGS) if read.optional("pooling", str) else None
        return cls(read.positive("max_seq_len"), labels, problem, pooling, read("normalize", bool))


def repeated(labels: Sequence[str]) -> str | None:
    """A label that another one is called too; None where each has a name of its own."""
    return next((label for label, count in Counter(labels).items() if count > 1), None)


def encoder_output(task: str, pooling: str | None) -> str:
    """The name of a graph's output."""
    if task != FEATURES:
        return LOGITS
    return SENTENCE_EMBEDDING if pooling else LAST_HIDDEN_STATE


def wrong_task(where: object, task: TaskName) -> UserError:
    """A bundle opened or asked for what another one does."""
    return UserError(f"{where}: a bundle for {task}; {REMEDY[task]}")
