"""Whether there is what actors reserve: Ray would wait for it for ever."""

from __future__ import annotations

from collections.abc import Mapping

from glm4runtime.contract import UserError


def require_room(actors: str, count: int, each: Mapping[str, float], place: str, there: Mapping[str, float]) -> None:
    """actors: what they are called. each: what one of them reserves, by Ray's names. there: what the place has in all.

    Raises UserError where that is less than all of them reserve.
    """
    for name, one in each.items():
        if count * one > (found := there.get(name, 0)):
            raise UserError(
                f"{count} {actors} reserve {count * one:g} {name}s, {one:g} each, and {place} has {found:g}; take "
                f"fewer {actors}{', or fewer threads for each' if name == 'CPU' else ''}, or a larger cluster"
            )
