"""Which replica a request goes to, so that it meets the prefix cache that holds its beginning: pure decisions."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

BLOCK = 256  # bytes of a prompt that are compared as one
MOST_BLOCKS = 128  # beginnings are compared up to so many blocks

#: What a prompt is made of, in the order in which templates write it, in any of the protocols.
_PROMPT = ("model", "cache_salt", "tools", "system", "instructions", "prompt", "messages", "input")


def blocks_of(body: bytes) -> tuple[bytes, ...]:
    """A hash for each beginning of a request's prompt, one block longer each, shortest first; () for a body without.

    Two requests share as many of them as they share whole blocks. The last, incomplete one counts only where a prompt
    has no whole block, so that equal short prompts meet.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # the application tells the client
        return ()
    if not isinstance(fields, dict) or not any(name in fields for name in _PROMPT[2:]):
        return ()
    text = "\0".join(_text(fields.get(name)) for name in _PROMPT).encode("utf-8", "surrogatepass")
    ends = range(BLOCK, min(len(text), MOST_BLOCKS * BLOCK) + 1, BLOCK)
    hashed, found, begin = hashlib.blake2b(digest_size=16), [], 0
    for end in ends or (len(text),):
        hashed.update(text[begin:end])
        found.append(hashed.digest())
        begin = end
    return tuple(found)


class Holders:
    """Which replica last got each beginning: the most recent ones."""

    def __init__(self, most: int = 100_000) -> None:
        """most: beginnings that are remembered."""
        self._most = most
        self._replica: OrderedDict[bytes, str] = OrderedDict()

    def note(self, blocks: Sequence[bytes], replica: str) -> None:
        """A request of these blocks went there."""
        for block in blocks:
            self._replica[block] = replica
            self._replica.move_to_end(block)
        while len(self._replica) > self._most:
            self._replica.popitem(last=False)

    def forget(self, replica: str) -> None:
        """It is gone, and its cache with it."""
        self._replica = OrderedDict((block, other) for block, other in self._replica.items() if other != replica)

    def of(self, blocks: Sequence[bytes], replicas: Mapping[str, int]) -> str | None:
        """The replica, of those given, that got the longest of these beginnings."""
        for block in reversed(blocks):
            replica = self._replica.get(block)
            if replica is not None and replica in replicas:
                return replica
        return None


def order(blocks: Sequence[bytes], holder: str | None, loads: Mapping[str, int], busy: int) -> list[str]:
    """All replicas, the best first.

    blocks: as :func:`blocks_of` gives them. holder: the replica whose cache should hold the prompt's beginning.
    loads: requests that each replica has. busy: with so many a replica's slots are all taken.

    The holder comes first; for a beginning that nobody holds, the replica that a hash of it names, the same whoever
    asks (rendezvous hashing: when replicas come or go, only their own beginnings move). Where that one is busy and
    another one has fewer requests, the cache isn't worth the wait: then, and without blocks, the least loaded is first.
    """
    turn = {replica: _weight(blocks[:1], replica) for replica in loads}
    by_load = sorted(loads, key=lambda replica: (loads[replica], turn[replica]))
    if not (by_load and blocks):
        return by_load
    first = holder if holder is not None else min(loads, key=lambda replica: turn[replica])
    if loads[first] >= busy and loads[by_load[0]] < loads[first]:
        return by_load
    return [first, *(replica for replica in by_load if replica != first)]


def _weight(blocks: Sequence[bytes], replica: str) -> bytes:
    return hashlib.blake2b(b"".join(blocks) + replica.encode(), digest_size=8).digest()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value is not None else ""
