"""What the lanes of a warp do together: shuffles, votes, matches and reductions, with their member masks checked."""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .group import WARP, Group

Array = NDArray[Any]
Fail = Callable[[str, int], None]
"""Reports what is wrong, for the active lane at a position."""

_LANE = np.arange(WARP)
_BIT = np.uint32(1) << _LANE.astype("u4")


def members(g: Group, mask: Array, fail: Fail) -> Array:
    """(warps, 32, 32): whether lane i counts lane j in; every lane must be in its own mask."""
    own = g.spread(np.broadcast_to(mask, g.n))
    inside = own & _BIT != 0
    if not inside[g.present].all():
        fail("a thread executes the instruction without being in its member mask", _first(g, ~inside))
    return (own[:, :, None] & _BIT != 0) & g.present[:, None, :]


def _first(g: Group, wrong: Array) -> int:
    return int(np.flatnonzero(g.gather(wrong))[0])


def shuffle(g: Group, mode: str, a: Array, b: Array, c: Array, mask: Array, fail: Fail) -> tuple[Array, Array]:
    """shfl.sync: the value of the source lane, and whether it is in range (PTX ISA, shfl)."""
    here = members(g, mask, fail)
    value, b, c = g.spread(a), g.spread(b).astype("i8"), g.spread(c).astype("i8")
    offset, clamp, segment = b & 31, c & 31, c >> 8 & 31
    last = (_LANE & segment) | (clamp & ~segment)
    first = _LANE & segment
    match mode:
        case "up":
            source = _LANE - offset
            inside = source >= last
        case "down":
            source = _LANE + offset
            inside = source <= last
        case "bfly":
            source = _LANE ^ offset
            inside = source <= last
        case _:
            source = first | (offset & ~segment)
            inside = source <= last
    source = np.where(inside, source, _LANE)
    missing = inside & ~np.take_along_axis(here, source[:, :, None], axis=2)[:, :, 0] & g.present
    if missing.any():
        fail("the shuffle reads from a thread that is not active", _first(g, missing))
    return g.gather(np.take_along_axis(value, source, axis=1)), g.gather(inside)


def ballot(g: Group, predicate: Array, mask: Array, fail: Fail) -> Array:
    """Bits of the members whose predicate holds."""
    here = members(g, mask, fail)
    return g.gather(((here & g.spread(predicate)[:, None, :]) * _BIT).sum(axis=2, dtype="u4"))


def vote(g: Group, mode: str, predicate: Array, mask: Array, fail: Fail) -> Array:
    """vote.sync: all, any, uni or ballot."""
    holds = ballot(g, predicate, mask, fail)
    if mode == "ballot":
        return holds
    if mode == "any":
        return holds != 0
    present = ballot(g, np.ones(g.n, np.bool_), mask, fail)
    return holds == present if mode == "all" else (holds == present) | (holds == 0)


def active_mask(g: Group) -> Array:
    """Bits of the lanes that are here."""
    return g.gather(np.repeat((g.present * _BIT).sum(axis=1, dtype="u4")[:, None], WARP, axis=1))


def match(g: Group, mode: str, a: Array, mask: Array, fail: Fail) -> tuple[Array, Array]:
    """match.sync: members with the same value; for `all`, the mask if all have it, and whether they do."""
    here = members(g, mask, fail)
    value = g.spread(a)
    same = here & (value[:, :, None] == value[:, None, :])
    found = g.gather((same * _BIT).sum(axis=2, dtype="u4"))
    everyone = found == g.gather((here * _BIT).sum(axis=2, dtype="u4"))
    return (found if mode == "any" else np.where(everyone, found, np.uint32(0))), everyone


_REDUCE: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduce(g: Group, name: str, a: Array, mask: Array, fail: Fail) -> Array:
    """redux.sync."""
    here = members(g, mask, fail)
    value = np.broadcast_to(g.spread(a)[:, None, :], here.shape)
    info = np.iinfo(value.dtype)
    neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(name, 0)
    filled = np.where(here, value, value.dtype.type(neutral))
    return g.gather(_REDUCE[name].reduce(filled, axis=2, dtype=value.dtype))


def elect(g: Group, mask: Array, fail: Fail) -> tuple[Array, Array]:
    """elect.sync: the lowest member, and whether the lane is it."""
    leader = members(g, mask, fail).argmax(axis=2)
    return g.gather(leader.astype("u4")), g.gather(leader == _LANE)
