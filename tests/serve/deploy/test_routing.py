from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4serve.deploy.routing import BLOCK, MOST_BLOCKS, Holders, blocks_of, order

REPLICAS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 20), min_size=1)
BLOCKS = st.lists(st.binary(min_size=2, max_size=2), max_size=5)


def chat(*texts: str, **more: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text} for text in texts], **more}).encode()


def shared(first: bytes, second: bytes) -> int:
    return sum(a == b for a, b in zip(blocks_of(first), blocks_of(second), strict=False))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"7", b"{}", b'{"model": "m"}', b"\xff\xfe", b'{"text": "tokenize"}']
)
def test_what_has_no_prompt_has_no_blocks(body: bytes) -> None:
    assert blocks_of(body) == ()


def test_requests_share_the_blocks_of_their_common_beginning() -> None:
    system = "s" * 10 * BLOCK
    first, second = chat(system, "one", temperature=0, stream=True), chat(system, "two", temperature=1)
    assert shared(first, second) == 10
    assert shared(first, chat(system, "one")) == len(blocks_of(first))  # other fields are no part of the prompt
    assert shared(first, chat(system, "one", cache_salt="x")) == shared(first, chat(system, "one", model="m")) == 0
    assert shared(first, chat("t" + system, "one")) == 0
    assert len(blocks_of(chat("s" * 10**6))) == MOST_BLOCKS


def test_short_and_broken_texts() -> None:
    assert blocks_of(chat("Hi")) == blocks_of(chat("Hi")) != blocks_of(chat("Ho"))
    assert len(blocks_of(b'{"prompt": "\\ud800"}')) == 1  # half a surrogate pair
    assert len(blocks_of(b'{"prompt": [1, 2, 3]}')) == 1


@given(loads=REPLICAS, blocks=BLOCKS, busy=st.integers(1, 8), data=st.data())
def test_order(loads: dict[str, int], blocks: list[bytes], busy: int, data: st.DataObject) -> None:
    """Every replica once, the same whoever asks; the holder unless it is busy and another one less so."""
    holder = data.draw(st.none() | st.sampled_from(sorted(loads)))
    ranked = order(blocks, holder, loads, busy)
    assert sorted(ranked) == sorted(loads)
    assert ranked == order(blocks, holder, dict(reversed(loads.items())), busy)
    least, behind = min(loads.values()), [loads[replica] for replica in ranked[1:]]
    assert behind == sorted(behind)
    if not blocks:
        assert loads[ranked[0]] == least
    elif holder is not None:
        assert (ranked[0] == holder) or (loads[holder] >= busy and loads[ranked[0]] == least < loads[holder])
    else:
        assert loads[ranked[0]] < busy or loads[ranked[0]] == least or all(load >= busy for load in loads.values())


@given(blocks=BLOCKS.filter(bool), replicas=st.sets(st.sampled_from("abcdefgh"), min_size=2))
def test_only_a_lost_replicas_beginnings_move(blocks: list[bytes], replicas: set[str]) -> None:
    home = order(blocks, None, dict.fromkeys(replicas, 0), 4)[0]
    for lost in replicas - {home}:
        assert order(blocks, None, dict.fromkeys(replicas - {lost}, 0), 4)[0] == home


def test_beginnings_spread() -> None:
    loads = dict.fromkeys("abcd", 0)
    homes = [order(blocks_of(chat(f"{n} " * 300)), None, loads, 4)[0] for n in range(400)]
    assert all(60 < homes.count(replica) < 140 for replica in loads)


def test_holders() -> None:
    holders = Holders(most=4)
    holders.note([b"1", b"2"], "a")
    holders.note([b"1", b"2", b"3"], "b")
    assert holders.of([b"1", b"2", b"9"], {"a": 0, "b": 0}) == "b"  # the last that got it
    assert holders.of([b"1"], {"a": 0}) is None and holders.of([], {"a": 0}) is None
    holders.note([b"4", b"5"], "a")  # 1 is the oldest
    assert holders.of([b"1"], {"b": 0}) is None and holders.of([b"2"], {"b": 0}) == "b"
    holders.forget("b")
    assert holders.of([b"2", b"3"], {"a": 0, "b": 0}) is None and holders.of([b"4"], {"a": 0, "b": 0}) == "a"
