"""Rows of prompts that were computed before, kept for prompts that begin the same way.

A tree of blocks: each holds the cache's rows of a fixed number of tokens, and is reached from the root of its salt by
these and all tokens in front of them. Tokens themselves are compared, not hashes of them. What is stored is copied out
of the cache, so that it outlives the sequence; where memory is short, what was used longest ago goes first, from the
leaves on. Which rows are worth keeping (those of prompts, or answers too) is the caller's decision.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glm4runtime.contract import UserError

BLOCK = 64  # tokens


def block_for(prompt_grid: int) -> int:
    """Tokens in a block: a multiple of where a prompt's runs may begin, so that no hit has to be cut."""
    return math.ceil(BLOCK / prompt_grid) * prompt_grid


@dataclass(frozen=True)
class PrefixStats:
    """Counters since the start, and what is stored now."""

    queries: int
    query_tokens: int
    hit_tokens: int
    evictions: int  # blocks
    blocks: int
    stored_bytes: int
    capacity_bytes: int


class Node:
    """A block, or the root of a salt, which has no rows."""

    __slots__ = ("children", "parent", "pins", "rows", "salt", "tokens")

    def __init__(self, salt: str, parent: Node | None, tokens: bytes, rows: np.ndarray) -> None:
        self.salt, self.parent = salt, parent
        self.tokens = tokens  # little-endian int64 [block]
        self.rows = rows  # uint8 [block * row_bytes], as BatchRunner.read_rows gives them
        self.children: dict[bytes, Node] = {}
        self.pins = 0


class Hit:
    """What the store has of a prompt; stays there until :meth:`release`, or the end of a ``with`` block.

    Iterating gives each block's first token and its rows, uint8 [block * row_bytes], read-only, in order.
    """

    def __init__(self, path: list[Node], block: int) -> None:
        self.rows = len(path) * block  # tokens
        self._blocks = [(index * block, node.rows) for index, node in enumerate(path)]
        self._last = path[-1] if path else None
        if self._last:
            self._last.pins += 1

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self._blocks)

    def __enter__(self) -> Hit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the store evict these blocks again. A second call does nothing."""
        if self._last:
            self._last.pins -= 1
        self._last, self._blocks = None, []


class PrefixStore:
    """Blocks of rows by the tokens that lead to them. Not thread-safe: one thread owns it.

    ``capacity_bytes`` of rows at most; 0 stores nothing. ``row_bytes``: of one token (``BatchRunner.row_bytes``).
    ``identity``: of all that rows depend on but tokens and salt, such as the bundle's sha256 and the cache's dtype; a
    saved store is only taken back by one of the same.
    """

    def __init__(self, capacity_bytes: int, row_bytes: int, *, identity: bytes, block: int = BLOCK) -> None:
        """block: tokens in a block, see :func:`block_for`. Raises UserError for a number that makes no sense."""
        for name, value, least in (
            ("prefix cache capacity in bytes", capacity_bytes, 0), ("row_bytes", row_bytes, 1), ("block", block, 1)
        ):  # fmt: skip
            if value < least:
                raise UserError(f"{name}: {value}, expected at least {least}")
        self.capacity_bytes, self.row_bytes = capacity_bytes, row_bytes
        self.identity, self.block = identity, block
        self.block_bytes = block * row_bytes
        self._roots: dict[str, Node] = {}
        # From the one used longest ago on. A node is never older than those behind it: they are touched first.
        self._nodes: OrderedDict[Node, None] = OrderedDict()
        self._queries = self._query_tokens = self._hit_tokens = self._evictions = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of rows."""
        return len(self._nodes) * self.block_bytes

    def match(self, tokens: Sequence[int] | np.ndarray, salt: str = "", limit: int | None = None) -> Hit:
        """The longest run of blocks that ``tokens`` begin with and that was stored with this salt.

        limit: the most tokens wanted, say all but those whose logits are to be computed. The hit is pinned: release it
        when its rows are copied.
        """
        path = self._path(self._keys(tokens[:limit]), salt)
        self._touch(path)
        self._queries += 1
        self._query_tokens += len(tokens)
        hit = Hit(path, self.block)
        self._hit_tokens += hit.rows
        return hit

    def insert(self, tokens: Sequence[int] | np.ndarray, read: Callable[[int, int], np.ndarray], salt: str = "") -> int:
        """Store the whole blocks of a sequence that aren't there yet; returns how many tokens these have.

        read: gives the rows from a first token to an end, uint8 [block * row_bytes]; asked for new blocks only, and
        copied. Where all that could make room is pinned, or is the sequence itself, the rest isn't stored.

        Raises ValueError where rows are of another size.
        """
        keys = self._keys(tokens)
        path = self._path(keys, salt)
        self._touch(path)
        known = len(path)
        try:
            for index in range(known, len(keys)):
                with Hit(path, self.block):  # what it hangs on isn't evicted
                    if not self._make_room():
                        break
                    rows = read(index * self.block, (index + 1) * self.block)
                    if rows.dtype != np.uint8 or rows.size != self.block_bytes:
                        raise ValueError(f"rows: {rows.dtype} [{rows.size}], expected uint8 [{self.block_bytes}]")
                    path.append(self._add(salt, path[-1] if path else None, keys[index], rows.reshape(-1).copy()))
        finally:
            self._touch(path)
        return (len(path) - known) * self.block

    def stats(self) -> PrefixStats:
        """The numbers of this moment, for metrics."""
        return PrefixStats(
            self._queries, self._query_tokens, self._hit_tokens, self._evictions,
            len(self._nodes), self.stored_bytes, self.capacity_bytes,
        )  # fmt: skip

    def nodes(self) -> Iterator[Node]:
        """All blocks, from the one used last to the one used longest ago, so each behind the one it hangs on."""
        return reversed(self._nodes)

    def room(self) -> int:
        """Blocks that can be added before any has to go."""
        return (self.capacity_bytes - self.stored_bytes) // self.block_bytes

    def add_oldest(self, salt: str, parent: Node | None, tokens: bytes, rows: np.ndarray) -> Node:
        """Add a block behind ``parent`` as the one used longest ago, where it isn't there yet; the caller saw to room.

        For what :meth:`nodes` gave, in its order. rows: uint8 [block * row_bytes], kept as they are.
        """
        siblings = parent.children if parent else self._roots[salt].children if salt in self._roots else {}
        if tokens in siblings:
            return siblings[tokens]
        node = self._add(salt, parent, tokens, rows)
        self._nodes.move_to_end(node, last=False)
        return node

    def _keys(self, tokens: Sequence[int] | np.ndarray) -> list[bytes]:
        ids = np.asarray(tokens, "<i8")
        size = self.block
        return [ids[first : first + size].tobytes() for first in range(0, len(ids) - size + 1, size)]

    def _path(self, keys: list[bytes], salt: str) -> list[Node]:
        path: list[Node] = []
        node = self._roots.get(salt)
        for key in keys:
            node = node and node.children.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, path: list[Node]) -> None:
        for node in reversed(path):
            self._nodes.move_to_end(node)

    def _add(self, salt: str, parent: Node | None, tokens: bytes, rows: np.ndarray) -> Node:
        rows.flags.writeable = False
        if parent is None:
            parent = self._roots.setdefault(salt, Node(salt, None, b"", np.empty(0, np.uint8)))
        node = parent.children[tokens] = Node(salt, parent, tokens, rows)
        self._nodes[node] = None
        return node

    def _make_room(self) -> bool:
        """Evict leaves until there is room for a block; False where none can go."""
        while self.room() < 1:
            leaf = next((node for node in self._nodes if not node.children and not node.pins), None)
            if leaf is None:
                return False
            self._evict(leaf)
        return True

    def _evict(self, leaf: Node) -> None:
        del self._nodes[leaf]
        self._evictions += 1
        if leaf.parent:
            del leaf.parent.children[leaf.tokens]
            if leaf.parent.parent is None and not leaf.parent.children:
                del self._roots[leaf.salt]
