"""Which places a step's slots get, and what moves for it: no filler is ever in a slot's place."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from glm4runtime.backends.places import Places


@st.composite
def traffic(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    """Slots, a granule, and the slots of one step after the other."""
    slots, granule = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 4, 8]))
    step = st.lists(st.integers(0, slots - 1), min_size=1, max_size=slots, unique=True)
    return slots, granule, draw(st.lists(step, max_size=12))


@given(traffic())
def test_steps_have_the_first_places_and_fillers_nobodys(case: tuple[int, int, list[list[int]]]) -> None:
    slots, granule, steps = case
    places = Places(slots, granule)
    pool: list[Any] = [*range(slots), *["nobody"] * (places.count - slots)]  # what each place holds, as a pool would
    assert places.count == slots + granule - 1
    for chosen in steps:
        moves = places.moves(chosen)
        assert places.moves(chosen) == moves  # asking changes nothing
        strangers = [slot for place, slot in enumerate(pool) if place < len(chosen) and slot not in chosen]
        assert len(moves) <= len(strangers) + granule - 1
        for one, other in moves:
            pool[one], pool[other] = pool[other], pool[one]
            places.exchange(one, other)
        rows = places.rows(len(chosen))
        assert rows % granule == 0 and len(chosen) <= rows < len(chosen) + granule and rows <= places.count
        assert set(pool[: len(chosen)]) == set(chosen)
        assert set(pool[len(chosen) : rows]) <= {"nobody"}
        assert [pool[place] for place in places.place] == list(range(slots))
        assert [places.slot(place) for place in range(places.count)] == [
            None if slot == "nobody" else slot for slot in pool
        ]
        assert places.moves(chosen) == []  # the same step again moves nothing


def test_one_that_leaves_is_replaced_by_one_exchange() -> None:
    places = Places(8, 2)
    assert places.moves([0, 1, 2, 3, 4, 5]) == []
    assert places.moves([0, 2, 3, 4, 5]) == [(1, 5), (5, 8)]  # the hole, and the filler's place
    assert places.moves([0, 2, 3, 5]) == [(1, 5)]
