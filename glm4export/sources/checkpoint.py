"""Checkpoints in Hugging Face layout: finding them, reading them lazily, and the ledger of what they must hold.

safetensors only: the other formats are pickles, and unpickling runs whatever a file says.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm4export.sources.files import read_json, refuse_pointer
from glm4export.sources.ledger import mismatches, wrapped
from glm4export.terminal.errors import MOST_LINES, listed, printable
from glm4export.weights.storage import EMBEDDING, SCORE
from glm4export.weights.tensors import Window
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import HEADS, Encoding
from glm4runtime.contract import TEXT_FILES, UserError, shown

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # of a LoRA adapter, which is no model
SIDE_FILES = (CONFIG, "generation_config.json", *TEXT_FILES)
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_DTYPES = {
    **_DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_MAPPED_BYTES = 1 << 26  # of a file's pages touched before they're unmapped
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BASE = "model."  # in front of the names of what every head stands on, but in checkpoints of Glm4Model itself
_IN_BASE = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
_NEVER_STORED = re.compile(r"model\.rotary_emb\.inv_freq")  # a buffer that some transformers releases saved


class CheckpointError(UserError):
    """A checkpoint that can't be found, is damaged, or doesn't hold what its config.json promises."""


@dataclass(frozen=True)
class Location:
    """A checkpoint's folder, and what may be written into a bundle about where it came from (no local paths)."""

    folder: Path
    source: Mapping[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str  # in the file


def locate(
    model: str | None, *, revision: str | None = None, token: str | None = None, weights: bool = True
) -> Location:
    """Find a checkpoint: a local folder, a hub id (downloaded, or from the local hub cache), or None for the embedded.

    Without ``weights`` only the small files of a hub id are fetched.
    Raises CheckpointError when there is no such folder, repository or revision, or the hub can't be reached.
    """
    if model is None:
        _no_revision(revision, "the embedded model")
        return Location(Path(str(resources.files("glm4export") / "demo")), {"embedded": "glm4export.demo"})
    patterns = [*SIDE_FILES, ADAPTER, *((_INDEX, "model*.safetensors") if weights else ())]
    return _no_adapter(locate_files(model, patterns, revision=revision, token=token))


def _no_revision(revision: str | None, model: str) -> None:
    if revision is not None:
        raise CheckpointError(f"--revision goes with a hub id, not with {model}; leave it out")


def locate_files(
    model: str, patterns: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> Location:
    """Find a local folder, or a hub id's files of those names. Raises CheckpointError as :func:`locate`."""
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            _no_revision(revision, model)
            return Location(folder, {})
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~ of an unknown user, a null character
        raise CheckpointError(f"{model}: {_first_line(error)}") from None
    if _HUB_ID.fullmatch(model) and not exists:
        return _download(model, patterns, revision, token)
    raise CheckpointError(f"{model}: no such folder, and not a hub id such as zai-org/GLM-4-9B-0414")


class Checkpoint:
    """A checkpoint's tensors, read on demand. Nothing stays mapped: each read opens its file, copies, and closes."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self.tensors = tensors

    @classmethod
    def open(cls, folder: Path, dtypes: Mapping[str, torch.dtype] = _DTYPES) -> Checkpoint:
        """Read the headers of every shard, whose tensors have those dtypes (by safetensors' names).

        Raises CheckpointError for missing, damaged or pickled files, and for shards that their index contradicts.
        """
        placed = _weight_map(folder)
        files = [folder / name for name in sorted(set(placed.values()) or {_SINGLE})]
        found: dict[str, list[StoredTensor]] = {}
        for file in files:
            for name, tensor in stored_tensors(file, dtypes):
                found.setdefault(name, []).append(tensor)
        if placed:
            _check_index(folder / _INDEX, placed, found)
        bare = EMBEDDING not in found and EMBEDDING.removeprefix(_BASE) in found
        return cls(
            folder,
            {
                _BASE + name if bare and name.startswith(_IN_BASE) else name: tensors[0]
                for name, tensors in found.items()
            },
        )

    def read(self, name: str, window: Window) -> Tensor:
        """A copy of ``window`` (start and stop along each dim) of a tensor, in its stored dtype.

        Columns of a large matrix are gathered some rows at a time: the library maps the file, and mapped pages that
        were touched count as this process's memory until they're unmapped.
        """
        stored = self.tensors[name]
        (start, stop), *rest = window
        rows = max(1, _MAPPED_BYTES // (stored.dtype.itemsize * math.prod(stored.shape[1:])))
        pieces = []
        try:
            for first in range(start, stop, rows):
                bounds = ((first, min(first + rows, stop)), *rest)
                with safe_open(stored.file, framework="pt") as shard:
                    data: Tensor = shard.get_slice(stored.name)[tuple(slice(*pair) for pair in bounds)]
                    pieces.append(data.clone())  # the view would keep the file mapped
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {name} ({error})") from None

    def check(
        self, config: Glm4Config, encoding: Encoding | None = None, brought: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        """The ledger: every tensor the config calls for is there in its shape, and no other. Raises CheckpointError.

        ``encoding``: the head that is to be compiled, where it isn't a causal language model's. ``brought``: tensors
        that come from elsewhere, an adapter's head.
        """
        shapes = {name: stored.shape for name, stored in self.tensors.items() if not _NEVER_STORED.fullmatch(name)}
        shapes |= brought or {}
        if adapter := next((name for name in shapes if ".lora_" in name), None):
            raise CheckpointError(
                f"{self.folder}: {shown(adapter)} is a LoRA adapter's, not merged; save what its merge_and_unload() "
                "returns, or the adapter apart with its save_pretrained(), and give it with --lora"
            )
        if encoding is not None and encoding.task in HEADS and SCORE not in shapes:
            raise CheckpointError(
                f"{self.folder}: no {SCORE}, the head of {encoding.task}: a checkpoint that was trained for it has "
                "one, or an adapter (--lora); for embeddings build --task features"
            )
        if problem := wrapped(shapes) or self._mismatches(shapes, config, encoding):
            raise CheckpointError(f"{self.folder}: {problem}{self._unread()}")

    def _mismatches(
        self, shapes: Mapping[str, tuple[int, ...]], config: Glm4Config, encoding: Encoding | None
    ) -> str | None:
        return mismatches(shapes, config, encoding)

    def _unread(self) -> str:
        """A line about safetensors files of the folder that aren't this checkpoint's, if there are any."""
        read = {tensor.file.name for tensor in self.tensors.values()}
        others = sorted(path.name for path in self.folder.glob("*.safetensors") if path.name not in read)
        why = _SINGLE if read == {_SINGLE} else _INDEX
        return f"\n  not read, since {why} is: {printable(', '.join(others))}" if others else ""

    def fingerprint(self) -> str:
        """A sha256 over config.json and every tensor's name, shape and dtype; cheap, since no data is read."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        return digest.hexdigest()


def _no_adapter(location: Location) -> Location:
    folder = location.folder
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: a LoRA adapter ({ADAPTER}), not a model; {_with_base(folder)}")
    return location


def _with_base(folder: Path) -> str:
    return f"build the model that it was made for, with `--lora {folder}`"


def stored_tensors(file: Path, dtypes: Mapping[str, torch.dtype] = _DTYPES) -> Iterator[tuple[str, StoredTensor]]:
    """What a safetensors file's header says. Raises CheckpointError for a damaged file and for other dtypes."""
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a mapping
                view = shard.get_slice(name)
                kind = view.get_dtype()
                if kind not in dtypes:
                    supported = ", ".join(dtypes)
                    hint = "; if it is quantized, config.json lacks its quantization_config" if kind == "I32" else ""
                    raise CheckpointError(f"{file}: {printable(name)} has dtype {kind}; supported: {supported}{hint}")
                yield name, StoredTensor(file, tuple(view.get_shape()), dtypes[kind], name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged or truncated ({_first_line(error)}); fetch the file again") from None


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file of the folder each tensor is in, as the index has it; empty where a single file holds them all."""
    single, index = folder / _SINGLE, folder / _INDEX
    if not index.is_file():
        if single.is_file():
            return {}
        if (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder}: a LoRA adapter ({ADAPTER}), without weights; {_with_base(folder)}")
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} found{hint}")
    try:
        placed = read_json(index)["weight_map"]
        if not isinstance(placed, dict) or not placed:
            raise TypeError(f"weight_map is {shown(placed)}")
        files = sorted(set(placed.values()))
        outside = [name for name in files if Path(name).name != name or "\0" in name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{index}: not a safetensors index ({reason}); fetch it again") from None
    if outside:
        raise CheckpointError(f"{index}: names {shown(outside[0])}, which is not a file of this folder; refusing it")
    if single.is_file() and files != [_SINGLE]:
        raise CheckpointError(
            f"{folder}: holds {_SINGLE}, and {_INDEX} that names {len(files)} files; remove what isn't this model's"
        )
    missing = [printable(name) for name in files if not _is_file(folder / name)]
    if missing:
        names = ", ".join(missing[:MOST_LINES]) + (", …" if len(missing) > MOST_LINES else "")
        raise CheckpointError(f"{folder}: {len(missing)} of {len(files)} shards are missing: {names}")
    return placed


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _check_index(index: Path, placed: Mapping[str, str], found: Mapping[str, list[StoredTensor]]) -> None:
    """Each tensor lies in the file that the index gives it to and in no other: readers differ in which they take."""
    lines = []
    for name, file in sorted(placed.items()):
        holders = [tensor.file.name for tensor in found.get(name, [])]
        others = ", ".join(holder for holder in holders if holder != file)
        if file not in holders:
            lines.append(f"{name}: given to {file}, which doesn't hold it" + (f"; {others} does" if others else ""))
        elif others:
            lines.append(f"{name}: given to {file}, and in {others} too")
    for name in sorted(found.keys() - placed.keys()):
        if not _NEVER_STORED.fullmatch(name):
            lines.append(f"{name}: in {found[name][0].file.name}, and not in weight_map")
    if lines:
        raise CheckpointError(
            f"{index}: contradicted by its shards about {len(lines)} tensors; fetch index and shards again, or save "
            f"the model again\n  {listed(lines)}"
        )


def _download(repo_id: str, patterns: Sequence[str], revision: str | None, token: str | None) -> Location:
    """Fetch the files a build needs through huggingface_hub, which shows progress and resumes."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    at = f"{repo_id}@{revision}" if revision else repo_id
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{at}: not in the local hub cache, and the hub can't be reached; "
            "connect, unset HF_HUB_OFFLINE, or give a local folder"
        ) from None
    except (HfHubHTTPError, ValueError) as error:
        raise CheckpointError(f"{at}: {_first_line(error)}; check the id, --revision and --token") from None
    except Exception as error:  # a connection that breaks off raises the HTTP library's own classes
        raise CheckpointError(f"{at}: download failed ({_first_line(error)}); run again to go on from there") from None
    return Location(folder, {"repo_id": repo_id, "commit": folder.name})


def _first_line(error: Any) -> str:
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__))
