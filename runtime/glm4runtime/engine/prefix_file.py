"""A prefix store in a file, so that a service that starts again knows its prompts.

The file: 8 bytes of magic, version and length of the header (little-endian uint32 and uint64), the header (JSON), for
each block its tokens (little-endian int64) and its rows, and the sha256 of all that. No pickle: whatever a file holds,
reading it makes nothing but numbers. It holds users' prompts, so nobody but its owner may read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from glm4runtime import signals
from glm4runtime.contract import FieldReader, UserError, read_json
from glm4runtime.engine.prefix import Node, PrefixStore
from glm4runtime.folder.scratch import locked, scratch_folder, sweep

MAGIC = b"GLM4PFX\n"
VERSION = 1
_START = struct.Struct("<8sIQ")
_DIGEST_BYTES = 32
_MOST_HEADER_BYTES = 1 << 26
_WINDOW = 1 << 22  # bytes read at a time of what isn't kept


def save(store: PrefixStore, path: Path) -> None:
    """Write a store to a file, in one step: until it is whole, an earlier file stays.

    Raises UserError where it can't be written, or where something is there that isn't a saved store.
    """
    try:
        place = path.parent
        _require_ours(path)
        prefix = f".{path.name}-"
        with locked(place, "another process that saves here"):
            sweep(place, prefix)
            with scratch_folder(place, prefix) as scratch:
                new = scratch / "store"
                with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    _write(store, file)
                _require_ours(path)  # again: it took a while
                with signals.held():
                    new.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, or save it elsewhere" if full else "save it elsewhere"
        raise UserError(f"{path}: the prefix store cannot be written ({error.strerror}); {remedy}") from None


def restore(store: PrefixStore, path: Path) -> int:
    """Fill an empty store with what was saved, as far as there is room, from what was used last on.

    Returns how many tokens. Nothing is taken unless the whole file is as it was written.
    Raises UserError for a file that is missing, foreign, damaged, or of a store for something else, and where the store
    has blocks already.
    """
    if store.stored_bytes:
        raise UserError(f"{path}: the prefix store has blocks already; restore before the first request")
    try:
        # A pipe is opened at once, to be refused, even where nobody writes to it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: not a file; {_ELSE}")
            return _read(store, file, path)
    except OSError as error:
        raise UserError(f"{path}: the prefix store cannot be read ({error.strerror}); {_ELSE}") from None


_ELSE = "start without it, or name another file"


def _write(store: PrefixStore, file: BinaryIO) -> None:
    numbers: dict[Node, int] = {}
    salts: dict[str, int] = {}
    parents = []
    for number, node in enumerate(store.nodes()):
        numbers[node] = number
        parent = numbers.get(node.parent) if node.parent else None
        parents.append(~salts.setdefault(node.salt, len(salts)) if parent is None else parent)
    header = json.dumps(
        {
            "identity": store.identity.hex(),
            "block": store.block,
            "row_bytes": store.row_bytes,
            "salts": list(salts),
            "parents": parents,  # of each block: the number of the one in front of it, or ~ that of its salt
        }
    ).encode("ascii")
    if len(header) > _MOST_HEADER_BYTES:
        raise UserError(f"the prefix store has {len(parents)} blocks, too many for a file; give it larger ones")
    digest = hashlib.sha256()
    for part in (_START.pack(MAGIC, VERSION, len(header)), header):
        digest.update(part)
        file.write(part)
    for node in store.nodes():
        for data in (memoryview(node.tokens), node.rows.data):
            digest.update(data)
            file.write(data)
    file.write(digest.digest())


def _read(store: PrefixStore, file: BufferedReader, path: Path) -> int:
    start = file.read(_START.size)
    if len(start) < _START.size or start[:8] != MAGIC:
        raise UserError(f"{path}: not a saved prefix store; {_ELSE}")
    _, version, length = _START.unpack(start)
    if version != VERSION:
        raise UserError(f"{path}: a prefix store of format {version}, this version reads {VERSION}; {_ELSE}")
    size = os.fstat(file.fileno()).st_size
    if length > min(_MOST_HEADER_BYTES, size - _START.size - _DIGEST_BYTES):
        raise UserError(f"{path}: damaged, its header would have {length} bytes; delete it and {_ELSE}")
    text = file.read(length)
    salts, parents = _check_header(store, text, path)
    block_bytes = store.block * 8 + store.block_bytes
    whole = _START.size + length + len(parents) * block_bytes + _DIGEST_BYTES
    if size != whole:
        raise UserError(f"{path}: damaged, it has {size} bytes of {whole}; delete it and {_ELSE}")
    digest = hashlib.sha256(start + text)
    taken = [_read_block(store, file, digest) for _ in range(min(len(parents), store.room()))]
    rest = (len(parents) - len(taken)) * block_bytes
    while rest and (data := file.read(min(rest, _WINDOW))):
        digest.update(data)
        rest -= len(data)
    if digest.digest() != file.read(_DIGEST_BYTES):
        raise UserError(f"{path}: damaged, its sha256 is not the one at its end; delete it and {_ELSE}")
    nodes: list[Node] = []
    for parent, (tokens, rows) in zip(parents, taken, strict=False):
        if parent < 0:
            nodes.append(store.add_oldest(salts[~parent], None, tokens, rows))
        else:
            nodes.append(store.add_oldest(nodes[parent].salt, nodes[parent], tokens, rows))
    return store.stored_bytes // store.row_bytes


def _check_header(store: PrefixStore, text: bytes, path: Path) -> tuple[list[str], list[int]]:
    """The salts, and what each block hangs on."""
    try:
        header = read_json(text.decode("ascii"), str(path), f"delete it and {_ELSE}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged, its header is not text ({error}); delete it and {_ELSE}") from None
    for key, kind, own in (
        ("identity", str, store.identity.hex()), ("block", int, store.block), ("row_bytes", int, store.row_bytes)
    ):  # fmt: skip
        _require_same(header, key, kind, own)
    salts, parents = list(header.items("salts", str)), list(header.items("parents", int))
    for number, parent in enumerate(parents):
        if not -len(salts) <= parent < number:
            raise header.error(f"block {number} hangs on {parent}, which is not in front of it")
    return salts, parents


def _require_same(header: FieldReader, key: str, kind: type, own: str | int) -> None:
    found = header(key, kind)
    if found != own:
        raise UserError(
            f"{header.where}: saved for another bundle, cache or adapter: {key} is {found!r:.80}, here it is {own!r}; "
            f"{_ELSE}"
        )


def _read_block(store: PrefixStore, file: BufferedReader, digest: hashlib._Hash) -> tuple[bytes, np.ndarray]:
    tokens, rows = file.read(store.block * 8), np.empty(store.block_bytes, np.uint8)
    file.readinto(rows.data)
    digest.update(tokens)
    digest.update(rows.data)
    return tokens, rows


def _require_ours(path: Path) -> None:
    """Raise UserError where something is in the way of a saved store that isn't one."""
    if not os.path.lexists(path):
        return
    ours = False
    if stat.S_ISREG(path.lstat().st_mode):
        with path.open("rb") as file:
            ours = file.read(len(MAGIC)) == MAGIC
    if not ours:
        raise UserError(
            f"{path}: exists and is not a saved prefix store; move it elsewhere, or save under another name"
        )
