"""A loaded bundle without a cache: embeddings and classifications of texts.

>>> from glm4runtime import load_encoder
>>> with load_encoder("glm-4-9b-features") as encoder:
...     embeddings = encoder.embed(["first text", "second text"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from glm4runtime.backends.encoder import EncoderRunner
from glm4runtime.backends.runner import refuse_closed
from glm4runtime.backends.settings import Provider, Settings, require_path, require_switch
from glm4runtime.backends.token_ids import checked_ids
from glm4runtime.contract import (
    FEATURES,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    TOKENIZER,
    BundleError,
    EncoderSpec,
    Manifest,
    UserError,
    read_manifest,
    shown,
    wrong_task,
)
from glm4runtime.contract.encoder_spec import MULTI_LABEL, REGRESSION
from glm4runtime.text.files import read_text_files
from glm4runtime.text.spans import Span, spans_of
from glm4runtime.text.tokenizer import Tokenizer

Text = str | Sequence[int]  # or its token ids
Progress = Callable[[int], object]  # told how many more texts are done

_Offsets = list[tuple[int, int] | None]


@dataclass(frozen=True)
class Classification:
    """The label of a text that has the highest score, and every label's score."""

    label: str
    score: float
    scores: dict[str, float]


def load_encoder(
    bundle: str | Path,
    *,
    provider: Provider | None = None,
    threads: int = 0,
    max_seq_len: int | None = None,
    batch_tokens: int = 2048,
    truncate: bool = False,
    check_hashes: bool = False,
    device_id: int = 0,
    gpu_mem_limit: float | None = None,
) -> Encoder:
    """Open a bundle that ``glm4export build`` made for features or classification.

    bundle: its folder. provider: ``cpu`` or ``cuda``, by default the bundle's target; a bundle for TensorRT runs in
    ONNX Runtime on ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``. threads: 0 lets ONNX Runtime choose.
    max_seq_len: the most tokens of a text, by default the bundle's. batch_tokens: how many, padding with them, are
    computed in one run; it bounds the memory. truncate: cut longer texts at their end, where they are an error
    otherwise; what tokenizer.json puts around them stays. check_hashes: compare every file's sha256 first.
    device_id, gpu_mem_limit: as :func:`glm4runtime.load`'s.

    Raises BundleError where the folder isn't a whole bundle of this format, UserError for settings that don't fit and
    for a bundle that generates text, which :func:`glm4runtime.load` opens.
    """
    Settings(provider=provider, threads=threads, max_seq_len=max_seq_len, check_hashes=check_hashes)  # checks them
    require_switch("truncate", truncate)
    require_path("bundle", bundle)
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise UserError(f"batch_tokens={shown(batch_tokens)} is not a whole number above 0")
    folder = Path(bundle)
    manifest = read_manifest(folder, check_hashes=check_hashes)
    if manifest.encoder is None:
        raise wrong_task(folder, manifest.task)
    limit = manifest.encoder.max_seq_len
    if max_seq_len is not None and not 1 <= max_seq_len <= limit:
        raise UserError(f"max_seq_len={max_seq_len} is not in 1..{limit}, the positions the bundle was built for")
    runner = EncoderRunner(
        folder, manifest, provider=provider, threads=threads, device_id=device_id, gpu_mem_limit=gpu_mem_limit
    )
    return Encoder(
        folder, manifest, manifest.encoder, runner, max_seq_len or limit, batch_tokens=batch_tokens, truncate=truncate
    )


class Encoder:
    """One bundle in memory. Not thread-safe: open one for each worker.

    Texts are str, or sequences of token ids. They are computed longest first, in batches of like length, and answered
    in the order given. A text's numbers depend on the texts beside it by rounding alone.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        spec: EncoderSpec,
        runner: EncoderRunner,
        max_seq_len: int,
        *,
        batch_tokens: int,
        truncate: bool,
    ) -> None:
        self.folder, self.manifest, self.spec, self.runner = folder, manifest, spec, runner
        self.max_seq_len, self.batch_tokens, self.truncate = max_seq_len, batch_tokens, truncate
        self._files = read_text_files(folder)

    def __enter__(self) -> Encoder:
        if self.runner.closed:
            refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph with its weights; what computes raises UserError from then on. Closing again does nothing."""
        self.runner.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError where it has none, or a broken one."""
        path = self.folder / TOKENIZER
        if TOKENIZER not in self._files:
            raise BundleError(f"{path}: missing; this bundle takes token ids only, build it from a checkpoint with one")
        return Tokenizer.from_bytes(self._files[TOKENIZER], str(path), whole_texts=True)

    def embed(self, texts: Sequence[Text], *, progress: Progress | None = None, first: int = 0) -> np.ndarray:
        """Each text's embedding, float32 [texts, hidden]. ``first`` is the number of the first one in errors.

        Raises UserError for a bundle that wasn't built with ``--pooling``, for a text without tokens, one that is too
        long, and ids outside the vocabulary.
        """
        self._require(FEATURES)
        if self.spec.pooling is None:
            raise UserError(
                f"{self.folder}: gives every token's hidden state (hidden_states); for one embedding per text build it "
                "with --pooling last or mean"
            )
        rows = self._run([ids for ids, _ in self._tokens(texts, first)], progress)
        return np.stack(rows) if rows else np.empty((0, self.manifest.config["hidden_size"]), np.float32)

    def hidden_states(
        self, texts: Sequence[Text], *, progress: Progress | None = None, first: int = 0
    ) -> list[np.ndarray]:
        """The last hidden state of every token of each text, float32 [tokens, hidden]; errors as :meth:`embed`'s."""
        self._require(FEATURES)
        if self.spec.pooling is not None:
            raise UserError(
                f"{self.folder}: gives one embedding per text (embed); for all tokens build without --pooling"
            )
        return self._run([ids for ids, _ in self._tokens(texts, first)], progress)

    def logits(self, texts: Sequence[Text], *, progress: Progress | None = None, first: int = 0) -> list[np.ndarray]:
        """A classifier's logits of each text, float32 [labels]; or of its tokens, [tokens, labels]."""
        self._require(SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION)
        return self._run([ids for ids, _ in self._tokens(texts, first)], progress)

    def classify(
        self, texts: Sequence[Text], *, progress: Progress | None = None, first: int = 0
    ) -> list[Classification]:
        """Each text's label.

        Scores are as in transformers' pipeline: probabilities that add up to 1, or of each label for itself where there
        is one or ``problem_type`` is ``multi_label_classification``; the plain number of a ``regression``.
        Raises UserError as :meth:`embed` does.
        """
        self._require(SEQUENCE_CLASSIFICATION)
        return [self._classification(row) for row in self.logits(texts, progress=progress, first=first)]

    def classify_tokens(
        self, texts: Sequence[str], *, progress: Progress | None = None, first: int = 0
    ) -> list[list[Span]]:
        """The labelled spans of each text, see :func:`glm4runtime.text.spans.spans_of`; errors as :meth:`embed`'s."""
        self._require(TOKEN_CLASSIFICATION)
        for index, text in enumerate(_listed(texts), first):
            if not isinstance(text, str):
                raise UserError(f"text {index} is {text!r:.80}: spans are of characters, so give a str (or use logits)")
        tokens = self._tokens(texts, first)
        rows = self._run([ids for ids, _ in tokens], progress)
        labels = self.spec.labels
        return [
            spans_of(text, offsets, _softmax(row), labels)
            for text, (_, offsets), row in zip(texts, tokens, rows, strict=True)
        ]

    def _classification(self, logits: np.ndarray) -> Classification:
        problem = self.spec.problem_type
        if problem == REGRESSION:
            scores = logits
        elif problem == MULTI_LABEL or len(logits) == 1:
            scores = 1 / (1 + np.exp(-logits))
        else:
            scores = _softmax(logits)
        best = int(scores.argmax())
        named = dict(zip(self.spec.labels, scores.tolist(), strict=True))
        return Classification(self.spec.labels[best], float(scores[best]), named)

    def _require(self, *tasks: str) -> None:
        if self.manifest.task not in tasks:
            raise wrong_task(self.folder, self.manifest.task)

    def _tokens(self, texts: Sequence[Text], first: int) -> list[tuple[np.ndarray, _Offsets]]:
        found = []
        for index, text in enumerate(_listed(texts), first):
            offsets: _Offsets = []
            ids: Sequence[int] = text if not isinstance(text, str) else []
            if isinstance(text, str):
                ids, offsets = self.tokenizer.encode_text(text, self.max_seq_len if self.truncate else None)
            checked = checked_ids(ids, self.manifest.vocab_size, f"text {index}")
            if len(checked) > self.max_seq_len and not self.truncate:
                raise UserError(
                    f"text {index} has {len(checked)} tokens, at most {self.max_seq_len} fit; shorten it, or open the "
                    "bundle with truncate=True (--truncate)"
                )
            found.append((checked[: self.max_seq_len], offsets[: self.max_seq_len]))
        return found

    def _run(self, tokens: Sequence[np.ndarray], progress: Progress | None) -> list[np.ndarray]:
        """The graph's output for each text, without what padding gave."""
        results: dict[int, np.ndarray] = {}
        by_token = self.manifest.task == TOKEN_CLASSIFICATION or (
            self.manifest.task == FEATURES and self.spec.pooling is None
        )
        for batch in self._batches(tokens):
            ids = np.full((len(batch), len(tokens[batch[0]])), self.manifest.tokens.pad or 0, np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(batch):
                length = len(tokens[index])
                ids[row, :length], mask[row, :length] = tokens[index], 1
            output = self.runner.run(ids, mask)
            for row, index in enumerate(batch):
                results[index] = output[row, : len(tokens[index])] if by_token else output[row]
            if progress is not None:
                progress(len(batch))
        return [results[index] for index in range(len(tokens))]

    def _batches(self, tokens: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Indices of texts that are computed together, longest first."""
        batch: list[int] = []
        for index in sorted(range(len(tokens)), key=lambda index: -len(tokens[index])):
            longest = len(tokens[batch[0]]) if batch else 0
            if batch and ((len(batch) + 1) * longest > self.batch_tokens or len(batch) == self.runner.most_rows):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def _listed(texts: Sequence[Text]) -> Sequence[Text]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise UserError(f"texts is {texts!r:.80}, expected a list of texts")
    return texts


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return shares
