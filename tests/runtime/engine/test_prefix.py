"""The prefix store against a model of it that is slow and plain, and its file against every kind of damage."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4runtime import UserError
from glm4runtime.engine.prefix import Hit, PrefixStore, block_for
from glm4runtime.engine.prefix_file import MAGIC, restore, save

BLOCK, ROW_BYTES = 2, 4
BLOCK_BYTES = BLOCK * ROW_BYTES
Key = tuple[str, tuple[int, ...]]  # salt, and all tokens up to a block's end


def new_store(blocks: int, **changes: Any) -> PrefixStore:
    return PrefixStore(
        blocks * BLOCK_BYTES, **{"row_bytes": ROW_BYTES, "identity": b"bundle", "block": BLOCK, **changes}
    )


def rows_of(salt: str, tokens: list[int] | tuple[int, ...]) -> np.ndarray:
    """What a cache would have for the last block of ``tokens``: other rows for any other text in front of it."""
    return np.frombuffer(hashlib.sha256(repr((salt, tuple(tokens))).encode()).digest()[:BLOCK_BYTES], np.uint8)


def reader(
    salt: str, tokens: list[int], asked: list[tuple[int, int]] | None = None
) -> Callable[[int, int], np.ndarray]:
    def read(first: int, end: int) -> np.ndarray:
        if asked is not None:
            asked.append((first, end))
        return rows_of(salt, tokens[:end])

    return read


def keys_of(salt: str, tokens: list[int]) -> list[Key]:
    return [(salt, tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


def contents(store: PrefixStore) -> list[Key]:
    """From the block used last on; asserts that each one's rows are its own."""
    found = []
    for node in store.nodes():
        tokens, at = [], node
        while at.parent is not None:
            tokens[:0] = np.frombuffer(at.tokens, "<i8").tolist()
            at = at.parent
        assert node.rows.tobytes() == rows_of(node.salt, tokens).tobytes()
        found.append((node.salt, tuple(tokens)))
    return found


class Model:
    """All blocks in a dictionary, with the time of their last use; of one use, the block behind counts as older."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.used, self.time = blocks, dict[Key, tuple[int, int]](), 0
        self.pinned: list[Key] = []

    def longest(self, keys: list[Key]) -> list[Key]:
        return [key for number, key in enumerate(keys) if all(front in self.used for front in keys[: number + 1])]

    def touch(self, keys: list[Key]) -> None:
        self.time += 1
        self.used.update({key: (self.time, -len(key[1])) for key in keys})

    def insert(self, keys: list[Key]) -> None:
        path = self.longest(keys)
        self.touch(path)
        for key in keys[len(path) :]:
            while len(self.used) >= self.blocks:
                fronts = {(salt, tokens[:-BLOCK]) for salt, tokens in self.used}
                leaves = [leaf for leaf in self.used if leaf not in fronts | set(self.pinned) | set(path[-1:])]
                if not leaves:
                    break
                del self.used[min(leaves, key=lambda leaf: self.used[leaf])]
            if len(self.used) >= self.blocks:
                break
            path.append(key)
            self.used[key] = (self.time + 1, -len(key[1]))
        self.touch(path)

    def contents(self) -> list[Key]:
        return sorted(self.used, key=lambda key: self.used[key], reverse=True)


TOKENS = st.lists(st.integers(0, 1), max_size=9)
SALT = st.sampled_from(["", "é", "\ud800"])
USES = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), TOKENS, SALT),
        st.tuples(st.just("match"), TOKENS, SALT),
        st.tuples(st.just("hold"), TOKENS, SALT),
        st.tuples(st.just("release"), st.just([]), st.just("")),
    ),
    max_size=25,
)


def used(blocks: int, uses: list[tuple[str, list[int], str]]) -> tuple[PrefixStore, Model]:
    """A store and its model after these uses; what a match gives is compared, and the contents after each."""
    store, model = new_store(blocks), Model(blocks)
    held: list[Hit] = []
    for what, tokens, salt in uses:
        keys = keys_of(salt, tokens)
        if what == "insert":
            asked: list[tuple[int, int]] = []
            before = model.longest(keys)
            count = store.insert(tokens, reader(salt, tokens, asked), salt)
            model.insert(keys)
            assert (
                asked
                == [(end - BLOCK, end) for end in range(len(before) * BLOCK + BLOCK, len(tokens) + 1, BLOCK)][
                    : count // BLOCK
                ]
            )
        elif what != "release":
            hit = store.match(tokens, salt)
            found = model.longest(keys)
            model.touch(found)
            assert hit.rows == len(found) * BLOCK
            assert [(first, block.tobytes()) for first, block in hit] == [
                (len(key[1]) - BLOCK, rows_of(*key).tobytes()) for key in found
            ]
            if what == "hold" and found:
                held.append(hit)
                model.pinned.append(found[-1])
            else:
                hit.release()
        elif held:
            held.pop(0).release()
            model.pinned.pop(0)
        assert contents(store) == model.contents()
        assert set(store._roots) == {salt for salt, _ in model.used}, "a salt without blocks is forgotten"
        assert store.stored_bytes == len(model.used) * BLOCK_BYTES <= store.capacity_bytes
    for hit in held:
        hit.release()
    return store, model


@given(st.integers(0, 8), USES)
@settings(max_examples=200, deadline=None)
def test_the_store_is_its_model(blocks: int, uses: list[tuple[str, list[int], str]]) -> None:
    store, _ = used(blocks, uses)
    stats = store.stats()
    queries = [tokens for what, tokens, _ in uses if what in ("match", "hold")]
    assert (stats.queries, stats.query_tokens) == (len(queries), sum(map(len, queries)))
    assert stats.blocks * BLOCK_BYTES == stats.stored_bytes


@given(st.integers(1, 8), USES, st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_saved_and_restored(tmp_path_factory: pytest.TempPathFactory, blocks: int, uses: Any, smaller: int) -> None:
    """All of it, in the order of use; a smaller store gets what was used last."""
    store, model = used(blocks, uses)
    path = tmp_path_factory.getbasetemp() / "round-trip"
    save(store, path)
    again, less = new_store(blocks), new_store(smaller)
    assert restore(again, path) == len(model.used) * BLOCK
    assert contents(again) == model.contents()
    restore(less, path)
    assert contents(less) == model.contents()[:smaller]
    path.unlink()


def filled(*texts: list[int], salt: str = "", blocks: int = 8) -> PrefixStore:
    store = new_store(blocks)
    for tokens in texts:
        store.insert(tokens, reader(salt, tokens), salt)
    return store


def test_only_a_new_store_is_filled(saved: Path) -> None:
    with pytest.raises(UserError, match="the prefix store has blocks already"):
        restore(filled([1, 1]), saved)


def test_a_read_that_fails_leaves_the_blocks_in_order(tmp_path: Path) -> None:
    store, tokens = new_store(8), [1, 1, 2, 2, 3, 3]

    def read(first: int, end: int) -> np.ndarray:
        if end == 6:
            raise RuntimeError("the device is gone")
        return rows_of("", tokens[:end])

    with pytest.raises(RuntimeError):
        store.insert(tokens, read)
    assert contents(store) == [("", (1, 1)), ("", (1, 1, 2, 2))]
    with pytest.raises(ValueError, match=r"rows: uint8 \[3\], expected uint8 \[8\]"):
        store.insert(tokens, lambda first, end: np.zeros(3, np.uint8))
    save(store, tmp_path / "saved")
    assert restore(new_store(8), tmp_path / "saved") == 4


def test_rows_are_copied_and_read_only() -> None:
    store, buffer = new_store(8), np.zeros(BLOCK_BYTES, np.uint8)
    store.insert([1, 1], lambda first, end: buffer)
    buffer[:] = 7
    with store.match([1, 1, 9]) as hit:
        ((first, rows),) = hit
        assert first == 0 and not rows.any() and not rows.flags.writeable
    hit.release()  # again
    assert list(hit) == []


def test_a_limit_cuts_a_hit() -> None:
    store = filled([1, 1, 2, 2])
    assert [store.match([1, 1, 2, 2], limit=limit).rows for limit in (0, 1, 2, 3, 4, 5)] == [0, 0, 2, 2, 4, 4]
    assert (store.stats().hit_tokens, store.stats().query_tokens) == (12, 24)


def test_blocks_are_multiples_of_the_grid() -> None:
    assert [block_for(grid) for grid in (1, 2, 48, 64, 100, 512)] == [64, 64, 96, 64, 100, 512]


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="capacity in bytes: -8, expected at least 0"):
        new_store(-1)
    with pytest.raises(UserError, match="row_bytes: 0, expected at least 1"):
        new_store(1, row_bytes=0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(filled([1, 1, 2, 2], [1, 1, 3, 3], salt="s"), tmp_path / "saved")
    return tmp_path / "saved"


def refused(path: Path, **changes: Any) -> str:
    store = new_store(8, **changes)
    with pytest.raises(UserError) as error:
        restore(store, path)
    assert str(path) in str(error.value) and "start without it" in str(error.value)
    assert store.stored_bytes == 0, "nothing of a refused file is taken"
    return str(error.value)


def test_every_truncation_and_every_flipped_bit_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        assert "damaged" in refused(saved) or length < 20
    saved.write_bytes(data + b"\0")
    assert "damaged" in refused(saved)
    for position in range(len(data)):
        saved.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        refused(saved)


def with_header(text: bytes) -> bytes:
    return struct.pack("<8sIQ", MAGIC, 1, len(text)) + text + bytes(32)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not a saved prefix store"),
        (b"\x80\x04K\x01." * 9, "not a saved prefix store"),
        (struct.pack("<8sIQ", MAGIC, 2, 0), "format 2, this version reads 1"),
        (struct.pack("<8sIQ", MAGIC, 1, 1 << 62), "header would have 4611686018427387904 bytes"),
        (with_header(b"\xff"), "header is not text"),
        (with_header(b"[" * 100_000), "not valid JSON"),
        (with_header(b"[]"), "expected an object, found list"),
        (with_header(b"{}"), "'identity' is missing"),
    ],
)
def test_foreign_files(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "foreign").write_bytes(data)
    assert expected in refused(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"[-1, 0, 0]", b"[-1, 0, 3]", "block 2 hangs on 3"),
        (b"[-1, 0, 0]", b"[-2, 0, 0]", "block 0 hangs on -2"),
        (b"[-1, 0, 0]", b"[-1, 0.,0]", "not valid JSON"),
        (b"[-1, 0, 0]", b"[-1,0.0,0]", "parents holds 0.0, expected int"),
        (b"[-1, 0, 0]", b"[-1, 0   ]", "bytes of"),
        (b'"block": 2', b'"block": 4', "block is 4, here it is 2"),
    ],
)
def test_headers_that_lie(saved: Path, old: bytes, new: bytes, expected: str) -> None:
    data = saved.read_bytes()
    assert old in data
    saved.write_bytes(data.replace(old, new))
    assert expected in refused(saved)


def test_the_same_block_twice(saved: Path) -> None:
    """A file with a right sha256 that no store wrote: the second is passed over, and nothing is lost track of."""
    data = saved.read_bytes()[:-32]
    size = 8 * BLOCK + BLOCK_BYTES
    data = data[:-size] + data[-2 * size : -size]
    saved.write_bytes(data + hashlib.sha256(data).digest())
    store = new_store(8)
    assert restore(store, saved) == 4
    assert contents(store) == [("s", (1, 1)), ("s", (1, 1, 3, 3))]


def test_a_store_of_something_else(saved: Path) -> None:
    assert f"identity is '{b'bundle'.hex()}', here it is '{b'other'.hex()}'" in refused(saved, identity=b"other")
    assert "row_bytes is 4, here it is 8" in refused(saved, row_bytes=8)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file or directory" in refused(tmp_path / "missing")
    assert "Is a directory" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refused(tmp_path / "pipe")


def test_a_users_file_is_kept(tmp_path: Path) -> None:
    notes, link, folder = tmp_path / "notes", tmp_path / "link", tmp_path / "folder"
    notes.write_bytes(b"mine")
    link.symlink_to(notes)
    folder.mkdir()
    for path in (notes, link, folder):
        with pytest.raises(UserError, match=f"{path}: exists and is not a saved prefix store"):
            save(filled([1, 1]), path)
    assert notes.read_bytes() == b"mine" and link.is_symlink()
    with pytest.raises(UserError, match="cannot be written"):
        save(filled([1, 1]), tmp_path / "missing" / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "notes"]


def test_an_earlier_store_is_replaced_in_one_step(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = saved.read_bytes()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    with monkeypatch.context() as patch:
        patch.setattr(PrefixStore, "nodes", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"No space left on device.*free some space"):
            save(filled([4, 4]), saved)
    assert saved.read_bytes() == earlier
    save(filled([4, 4]), saved)
    assert restore(new_store(8), saved) == BLOCK
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
