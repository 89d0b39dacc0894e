"""LoRA adapters in peft's layout, merged into a checkpoint as its tensors are read.

A merged tensor is made of the window that is asked for, in the arithmetic of peft's ``merge_and_unload()``: W +
scaling * B @ A in float32, rounded to the checkpoint's dtype, one adapter after another. (An embedding's B @ A is
rounded by itself first.) With DoRA, times magnitude / |W + scaling * B @ A|, a norm over each row; over each column of
an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from glm4export.sources.checkpoint import ADAPTER, Checkpoint, Location, locate_files, stored_tensors
from glm4export.sources.ledger import Shape
from glm4export.sources.lora_config import AdapterConfig, AdapterError, read_adapter_config
from glm4export.sources.lora_ledger import WRAPPER, Delta, Plan, read_plan
from glm4export.terminal.errors import printable
from glm4export.weights.storage import EMBEDDING, HEAD, SCORE
from glm4export.weights.tensors import Window
from glm4export.weights.write import windows
from glm4runtime.contract import sha256_of, shown

WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_RECORD = "lora."  # in front of a manifest's facts about adapters
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-6, 1e6


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, opened: nothing of it is in memory."""

    folder: Path
    scale: float
    config: AdapterConfig
    stored: Checkpoint
    source: Mapping[str, str]  # as Location's

    @classmethod
    def open(cls, location: Location, scale: float = 1.0) -> Adapter:
        """Read config and header. Raises AdapterError for a folder without them, and for pickles."""
        folder = location.folder
        config = read_adapter_config(folder / ADAPTER)
        if not (folder / WEIGHTS).is_file():
            pickle = f"; {_PICKLE} is a pickle, which is never read" if (folder / _PICKLE).exists() else ""
            raise AdapterError(
                f"{folder}: no {WEIGHTS}{pickle}; load the adapter with peft where you trust it, and save it again "
                "with save_pretrained(), which writes safetensors"
            )
        tensors = dict(stored_tensors(folder / WEIGHTS))
        return cls(folder, scale, config, Checkpoint(folder, tensors), location.source)

    def facts(self) -> dict[str, str]:
        """What tells it from others; reads the files."""
        return {
            "weights_sha256": sha256_of(self.folder / WEIGHTS),
            "config_sha256": sha256_of(self.folder / ADAPTER),
            "scale": repr(self.scale),
        }

    def other_base(self, location: Location) -> str | None:
        """A line for the user where the adapter names another model than this one; folders may have any name."""
        base = self.config.base
        here = location.source.get("repo_id") or location.folder.name
        if base is None or Path(base).name.lower() == Path(here).name.lower():
            return None
        return f"{self.folder}: the adapter names {shown(base)} as its model, and is merged into {here}"


def open_adapter(text: str, *, token: str | None = None, commit: str | None = None) -> Adapter:
    """Find and open what ``--lora DIR[:SCALE]`` names, as checkpoints are found.

    Raises UserError for a scale that merges nothing or isn't a number, and as :meth:`Adapter.open`.
    """
    name, scale = _parse(text)
    return Adapter.open(locate_files(name, [ADAPTER, WEIGHTS], revision=commit, token=token), scale)


def _parse(text: str) -> tuple[str, float]:
    name, colon, tail = text.rpartition(":")
    if not colon or _is_folder(text):
        return text, 1.0
    try:
        scale = float(tail)
    except ValueError:
        raise AdapterError(
            f"--lora {text}: no such folder, and {tail!r} is not a scale; give DIR or DIR:SCALE, such as {name}:0.5"
        ) from None
    if not _SMALLEST_SCALE <= abs(scale) <= _LARGEST_SCALE:
        raise AdapterError(
            f"--lora {text}: the scale must be {_SMALLEST_SCALE} to {_LARGEST_SCALE:.0f}, or that below zero"
        )
    return name, scale


def _is_folder(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def source_of(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Which adapters these are, in their order, as a manifest keeps it: flat, without local paths."""
    return {
        f"{_RECORD}{number}.{key}": value
        for number, adapter in enumerate(adapters, start=1)
        for key, value in {**adapter.source, **adapter.facts()}.items()
    }


def recorded(source: Mapping[str, str], given: Sequence[str]) -> list[Adapter]:
    """The adapters that a bundle was built with, by its manifest's source: those that are given, or from the hub.

    Raises AdapterError where those that are given are others, and where they're needed and none are.
    """
    entries: dict[str, dict[str, str]] = {}
    for key, value in source.items():
        if key.startswith(_RECORD):
            number, _, fact = key.removeprefix(_RECORD).partition(".")
            entries.setdefault(number, {})[fact] = value
    count, built = len(entries), "the bundle was built without LoRA adapters"
    if not count and not given:
        return []
    wanted = [entries[number] for number in sorted(entries, key=lambda text: (len(text), text))]
    if count:
        scales = ", ".join(entry.get("scale", "?") for entry in wanted)
        built = f"the bundle was built with {count} LoRA adapter{'s' * (count > 1)} (scale {scales})"
    if given:
        adapters = [open_adapter(text) for text in given]
    elif all({"repo_id", "commit", "scale"} <= entry.keys() for entry in wanted):
        adapters = [open_adapter(f"{e['repo_id']}:{e['scale']}", commit=e["commit"]) for e in wanted]
    else:
        raise AdapterError(f"{built} from a local folder; name each with --lora DIR[:SCALE], in the order of the build")
    if len(adapters) != count:
        raise AdapterError(f"{built}; --lora names {len(adapters)}")
    for adapter, entry in zip(adapters, wanted, strict=True):
        for fact, found in adapter.facts().items():
            if found != entry.get(fact):
                raise AdapterError(f"{adapter.folder}: {fact} is {found}; {built}, of {entry.get(fact)} in this place")
    return adapters


class MergedCheckpoint(Checkpoint):
    """A checkpoint as it is with adapters merged. Reading costs a rank's worth of arithmetic, and no whole tensor."""

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        plans: Sequence[Plan],
        *,
        tied: bool,
        brought: Mapping[str, Shape],
    ) -> None:
        self.base, self.adapters = base, tuple(adapters)
        self._replaced = {name: part for plan in plans for name, part in plan.replaced.items()}
        self._deltas: dict[str, list[Delta]] = {}
        for plan in plans:
            for name, delta in plan.deltas.items():
                self._deltas.setdefault(name, []).append(delta)
        self._norms: dict[Delta, Tensor] = {}
        tensors = dict(base.tensors)
        if tied and HEAD not in tensors and {EMBEDDING, HEAD} & (self._replaced.keys() | self._deltas.keys()):
            tensors[HEAD] = replace(tensors[EMBEDDING])  # tied until now: an adapter changes one of the two
        for name in brought:  # in the dtype that transformers makes it in before peft loads it
            stored, theirs = self._replaced[name]
            tensors[name] = replace(stored.tensors[theirs], dtype=tensors[EMBEDDING].dtype)
        super().__init__(base.folder, tensors)

    def read(self, name: str, window: Window) -> Tensor:
        """As :meth:`Checkpoint.read`. Raises AdapterError where a merged number leaves the stored dtype's range."""
        base = data = self._base(name, window)
        for delta in self._deltas.get(name, ()):
            data = self._added(name, delta, data, window)
        if data is not base and not torch.isfinite(data).all() and torch.isfinite(base).all():
            folders = ", ".join(str(delta.stored.folder) for delta in self._deltas[name])
            raise AdapterError(
                f"{name}: with {folders} merged a number leaves the range of the checkpoint's {data.dtype}"
            )
        return data

    def fingerprint(self) -> str:
        """The checkpoint's own: adapters are told apart by :func:`source_of`."""
        return self.base.fingerprint()

    def _base(self, name: str, window: Window) -> Tensor:
        """What adapters are added to, in the checkpoint's dtype."""
        if name in self._replaced:
            stored, theirs = self._replaced[name]
            return stored.read(theirs, window).to(self.tensors[name].dtype)
        return self.base.read(EMBEDDING if name == HEAD and HEAD not in self.base.tensors else name, window)

    def _added(self, name: str, delta: Delta, data: Tensor, window: Window) -> Tensor:
        update = delta.read(window)
        if delta.magnitude is not None:
            factor = delta.magnitude_of(window) / self._norm(name, delta)[delta.channels(window)]
            return (update.add_(data) * (factor if delta.embedding else factor[:, None])).to(data.dtype)
        if delta.embedding:
            update = update.to(data.dtype).float()
        return update.add_(data).to(data.dtype)

    def _norm(self, name: str, delta: Delta) -> Tensor:
        """Of each row, or each column of an embedding: float32, computed once, a window at a time."""
        if delta not in self._norms:
            shape = self.tensors[name].shape
            rows, columns = [], torch.zeros(shape[1], dtype=torch.float64)
            for window in windows(shape):
                data = delta.read(window).add_(self._base(name, window))
                if delta.embedding:
                    columns += data.double().square().sum(0)
                else:
                    rows.append(torch.linalg.norm(data, dim=1))
            self._norms[delta] = columns.sqrt().float() if delta.embedding else torch.cat(rows)
        return self._norms[delta]


def labels_brought(adapters: Sequence[Adapter]) -> int | None:
    """How many labels the classifier head has that an adapter was trained with and holds whole; None without one."""
    for adapter in adapters:
        head = adapter.stored.tensors.get(f"{WRAPPER}{SCORE}")
        if (
            head is not None
            and len(head.shape) == 2
            and head.shape[0]
            and adapter.config.saves(SCORE.removesuffix(".weight"))
        ):
            return head.shape[0]
    return None


def merged(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], *, tied: bool, brought: Mapping[str, Shape] | None = None
) -> Checkpoint:
    """The checkpoint with adapters merged in their order.

    tied: config.json's ``tie_word_embeddings``, for a checkpoint without a head. brought: the tensors of a classifier
    head that the checkpoint lacks, and one of the adapters is to bring.

    Raises AdapterError for tensors that are missing, unexpected or mis-shaped, all of an adapter's at once; for
    numbers that aren't finite; and for adapters that can't go together.
    """
    if not adapters:
        return checkpoint
    brought = brought or {}
    plans = [
        read_plan(adapter.stored, adapter.config, adapter.scale, checkpoint, tied=tied, brought=brought)
        for adapter in adapters
    ]
    _require_distinct(adapters)
    for index, (adapter, plan) in enumerate(zip(adapters, plans, strict=True)):
        require_finite(adapter)
        for other, earlier in zip(adapters[:index], plans[:index], strict=True):
            if clash := _clash(earlier, plan):
                raise AdapterError(f"{other.folder} and {adapter.folder}: {clash}; merge one of them")
    return MergedCheckpoint(checkpoint, adapters, plans, tied=tied, brought=brought)


def _require_distinct(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        first = seen.setdefault(sha256_of(adapter.folder / WEIGHTS), adapter)
        if first is not adapter:
            raise AdapterError(
                f"{first.folder} and {adapter.folder}: the same adapter twice; give it once, with the sum of the scales"
            )


def require_finite(adapter: Adapter) -> None:
    """Raise AdapterError naming a tensor that holds an infinity or NaN."""
    for name, tensor in adapter.stored.tensors.items():
        for window in windows(tensor.shape):
            if not torch.isfinite(adapter.stored.read(name, window)).all():
                raise AdapterError(f"{adapter.folder / WEIGHTS}: {printable(name)} holds a value that is not finite")


def _clash(one: Plan, other: Plan) -> str | None:
    """Why two adapters' sum isn't what either was trained for; None where they add up."""
    for first, second in ((one, other), (other, one)):
        for name in first.replaced:
            if name in second.replaced or name in second.deltas:
                return f"one replaces {name}, which the other changes"
        for name, delta in first.deltas.items():
            if delta.magnitude is not None and name in second.deltas:
                return f"both change {name}, one of them by DoRA, whose norm leaves no room for another"
    return None
