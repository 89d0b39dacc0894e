"""The file that ``glm4export adapter`` writes: a LoRA adapter as sessions load it. Standard library only.

It is a safetensors file (https://huggingface.co/docs/safetensors): eight bytes with the header's length, the header in
JSON, then the tensors' data without gaps. All are float32, named like the graphs' inputs (``lora.0.o_proj.A``), A
[rank, in] and B [rank, out]; those of ``qkv_proj`` have three times as many rows, q's, k's, then v's. Linears that the
adapter leaves alone aren't in it. ``__metadata__`` holds ``format``, ``base`` (the fingerprint of the checkpoint that
it is for), ``rank``, and the data's ``sha256``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from glm4runtime.contract.errors import BundleError
from glm4runtime.contract.files import SHA256, SHA256_WORDS
from glm4runtime.contract.json_reader import FieldReader, read_json, shown
from glm4runtime.contract.lora_spec import LORA_MODULES, lora_module

ADAPTER_FORMAT = "glm4export-adapter-1"
_REMEDY = "make it again with `glm4export adapter`"
_LONGEST_HEADER = 1 << 26  # bytes
_CHUNK = 1 << 20
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class AdapterFile:
    """A file's header, its data compared with its sha256."""

    path: Path
    base: str
    rank: int
    sha256: str  # of the data
    tensors: dict[str, tuple[tuple[int, int], int]]  # shape, and at which byte of the file

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Raises BundleError for another kind of file, and for a damaged one."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                    raise BundleError(f"{path}: not an adapter of `glm4export adapter`, or cut off; {_REMEDY}")
                text = file.read(length).decode()
                digest = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise BundleError(f"{path}: not an adapter of `glm4export adapter`, or damaged; {_REMEDY}") from None
        header = read_json(text, str(path), _REMEDY)
        facts = header.child("__metadata__")
        if (kind := facts.data.get("format")) != ADAPTER_FORMAT:
            raise facts.error(f"format is {shown(kind)}, expected {ADAPTER_FORMAT!r}")
        rank = int(facts.matching("rank", "[1-9][0-9]{0,5}", "a whole number"))
        tensors = {name: _tensor(name, header.child(name), rank) for name in header.data if name != "__metadata__"}
        _require_packed(header, tensors, size - 8 - length)
        wanted, found = facts.matching("sha256", SHA256, SHA256_WORDS), digest.hexdigest()
        if found != wanted:
            raise header.error(f"its data's sha256 is {found}, not {wanted} as it says itself")
        placed = {name: (shape, 8 + length + start) for name, (shape, start) in tensors.items()}
        return cls(path, facts.text("base"), rank, found, placed)


def _tensor(name: str, read: FieldReader, rank: int) -> tuple[tuple[int, int], int]:
    parts = name.split(".")
    if len(parts) != 4 or parts[2] not in LORA_MODULES:
        raise read.error(f"no side path is called {shown(name)}")
    shape, offsets = read.items("shape", int), read.items("data_offsets", int)
    rows = rank * LORA_MODULES[lora_module(name)]
    if read("dtype", str) != "F32" or len(shape) != 2 or shape[0] != rows or not 0 < shape[1] < 1 << 31:
        raise read.error(f"it is {shown(read.data['dtype'])} {shown(list(shape))}, expected F32 [{rows}, width]")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _FLOAT_BYTES:
        raise read.error(f"data_offsets {shown(list(offsets))} are not {math.prod(shape) * _FLOAT_BYTES} bytes")
    return (shape[0], shape[1]), offsets[0]


def _require_packed(header: FieldReader, tensors: dict[str, tuple[tuple[int, int], int]], size: int) -> None:
    """Tensors fill the data without gap or overlap."""
    end = 0
    for shape, start in sorted(tensors.values(), key=lambda item: item[1]):
        if start != end:
            raise header.error(f"a tensor begins at byte {start} of the data, the one in front ends at {end}")
        end = start + math.prod(shape) * _FLOAT_BYTES
    if end != size:
        raise header.error(f"its tensors take {end} bytes, the file holds {size}")
