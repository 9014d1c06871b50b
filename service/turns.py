"""Whose turn it is on the engine: callers that wait get equal shares of its time, however much each of them sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Final, Generic, TypeVar

from .principals import Principal

T = TypeVar("T")

# Callers whose time is remembered; those that have had no more than the others are left out first.
_REMEMBERED: Final = 4096


class Turns(Generic[T]):
    """Orders what waits: the caller that has had the least time comes first, then the others in turns.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with costs that are known afterwards: who comes back
    after a pause starts level with those that have waited, so nobody saves up time. Belongs to the engine's thread.

    Args:
        owner: Says whose an item is; None: nobody's, and what stands behind it stays behind it.
    """

    def __init__(self, owner: Callable[[T], Principal | None]) -> None:
        self._owner = owner
        self._seconds: dict[Principal, float] = {}  # of the engine's time; above `_level` only
        self._level = 0.0

    def arrange(self, waiting: deque[T]) -> None:
        """Put what waits in order; what is one caller's stays in the order in which it came."""
        lanes: dict[Principal, list[T]] = {}
        for item in waiting:
            owner = self._owner(item)
            if owner is None:
                break
            lanes.setdefault(owner, []).append(item)
        if not lanes:
            return
        order = sorted(lanes, key=self._time)
        self._level = self._time(order[0])
        if len(lanes) > 1:
            rows = zip_longest(*(lanes[owner] for owner in order))
            merged = [item for row in rows for item in row if item is not None]
            for _ in merged:
                waiting.popleft()
            waiting.extendleft(reversed(merged))

    def is_level(self, owner: Principal, other: Principal) -> bool:
        """Say whether a caller is another, or has had no more time than that."""
        return owner is other or self._time(owner) <= self._time(other)

    def charge(self, items: Iterable[T], seconds: float) -> None:
        """Count the time that some items took, so much for each."""
        for item in items:
            owner = self._owner(item)
            if owner is not None:
                self._seconds[owner] = self._time(owner) + seconds
        if len(self._seconds) > _REMEMBERED:
            self._seconds = {owner: had for owner, had in self._seconds.items() if had > self._level}

    def _time(self, owner: Principal) -> float:
        return max(self._level, self._seconds.get(owner, 0.0))
