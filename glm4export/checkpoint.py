"""Checkpoints in Hugging Face layout: finding them, reading them lazily, and the ledger of what they must hold.

safetensors only: the other formats are pickles, and unpickling runs whatever a file says.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm4export.quantize import Quantized, Scheme
from glm4export.recipes import Window
from glm4graphs.config import Glm4Config
from glm4graphs.model import Glm4ForCausalLM
from glm4runtime.contract import UserError

CONFIG = "config.json"
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAPPED_BYTES = 1 << 26  # of a file's pages touched before they're unmapped
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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


def locate(
    model: str | None, *, revision: str | None = None, token: str | None = None, weights: bool = True
) -> Location:
    """Find a checkpoint: a local folder, a hub id (downloaded, or from the local hub cache), or None for the embedded.

    Without ``weights`` only the small files of a hub id are fetched.
    Raises CheckpointError when there is no such folder, repository or revision, or the hub can't be reached.
    """
    if model is None:
        return Location(Path(str(resources.files("glm4export") / "demo")), {"embedded": "glm4export.demo"})
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return Location(folder, {})
        exists = folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long for the file system, or ~ of an unknown user
        raise CheckpointError(f"{model}: {_first_line(error)}") from None
    if _HUB_ID.fullmatch(model) and not exists:
        return _download(model, revision, token, weights)
    raise CheckpointError(f"{model}: no such folder, and not a hub id such as zai-org/GLM-4-9B-0414")


class Checkpoint:
    """A checkpoint's tensors, read on demand. Nothing stays mapped: each read opens its file, copies, and closes."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self.tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of every shard. Raises CheckpointError for missing, damaged or pickled files."""
        tensors: dict[str, StoredTensor] = {}
        for file in _shards(folder):
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118, not a mapping
                        view = shard.get_slice(name)
                        kind = view.get_dtype()
                        if kind not in _DTYPES:
                            supported = ", ".join(_DTYPES)
                            raise CheckpointError(f"{file}: {name} has dtype {kind}; supported: {supported}")
                        tensors[name] = StoredTensor(file, tuple(view.get_shape()), _DTYPES[kind])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file}: damaged or truncated ({_first_line(error)}); fetch the file again"
                ) from None
        return cls(folder, tensors)

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
                    data: Tensor = shard.get_slice(name)[tuple(slice(*pair) for pair in bounds)]
                    pieces.append(data.clone())  # the view would keep the file mapped
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {name} ({error})") from None

    def quantized(self, name: str, scheme: Scheme, rows: tuple[int, int]) -> Quantized | None:
        """None: a checkpoint alone has no calibrated weights; see :class:`glm4export.calibrate.Calibrated`."""
        return None

    def input_reach(self, name: str) -> float:
        """A checkpoint alone has run over no text; see :class:`glm4export.calibrate.Calibrated`."""
        raise AssertionError(f"{name}: a build that scales inputs is calibrated")

    def check(self, config: Glm4Config) -> None:
        """The ledger: every tensor the config calls for is there in its shape, and no other. Raises CheckpointError."""
        expected = expected_tensors(config)
        optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
        found = {name for name in self.tensors if not _NEVER_STORED.fullmatch(name)}
        lines = [f"missing {name} {list(expected[name])}" for name in sorted(expected.keys() - optional - found)]
        lines += [f"unexpected {name} {list(self.tensors[name].shape)}" for name in sorted(found - expected.keys())]
        lines += [
            f"mis-shaped {name}: {list(self.tensors[name].shape)}, expected {list(expected[name])}"
            for name in sorted(found & expected.keys())
            if self.tensors[name].shape != expected[name]
        ]
        if lines:
            raise CheckpointError(
                f"{self.folder}: {len(lines)} tensors do not match {CONFIG}; is it this model's config?\n  "
                + "\n  ".join(lines)
            )

    def fingerprint(self) -> str:
        """A sha256 over config.json and every tensor's name, shape and dtype; cheap, since no data is read."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        return digest.hexdigest()


def expected_tensors(config: Glm4Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of this geometry holds."""
    with torch.device("meta"):
        state = Glm4ForCausalLM(config, max_seq_len=1).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _shards(folder: Path) -> Iterator[Path]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        yield single
        return
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} found{hint}")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r}); fetch it again") from None
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which is not a file of this folder; refusing it")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}")
    yield from (folder / name for name in files)


def _download(repo_id: str, revision: str | None, token: str | None, weights: bool) -> Location:
    """Fetch the files a build needs through huggingface_hub, which shows progress and resumes."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*SIDE_FILES, *((_INDEX, "model*.safetensors") if weights else ())]
    at = f"{repo_id}@{revision}" if revision else repo_id
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
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
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
