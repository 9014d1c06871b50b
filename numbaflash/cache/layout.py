"""The arithmetic of the ring: which positions are visible, and in which slot of the page table each one lies.

Positions count a layer's tokens from 0. The first `sink_tokens` lie in slots of their own and stay; those behind them
go round: ring token r = position - sink_tokens lies in ring slot `(r // page_size) % ring_slots`, at `r % page_size`.
The ring holds the window and `rollback` tokens more, so that so many of the newest can be taken back with the whole
window still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["RingLayout", "Stretches"]


class Stretches(NamedTuple):
    """Consecutive positions, cut at page boundaries: (stretches,) int64 each, in order of position."""

    slot: NDArray[np.int64]
    offset: NDArray[np.int64]  # of the first token, inside its page
    position: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class RingLayout:
    """Shape of a ring; all attributes are tokens.

    Attributes:
        capacity: Tokens that stay visible, sink tokens included.
        sink_tokens: First tokens, which are never overwritten.
        page_size: Tokens of a page.
        rollback: Newest tokens that can always be taken back.
    """

    capacity: int
    sink_tokens: int
    page_size: int
    rollback: int

    @property
    def window(self) -> int:
        """Newest tokens that a query sees, its own included."""
        return self.capacity - self.sink_tokens

    @property
    def ring_tokens(self) -> int:
        """Newest tokens that are kept."""
        return self.window + self.rollback

    @property
    def sink_slots(self) -> int:
        """Slots of the sink tokens; they stand first in the page table."""
        return -(-self.sink_tokens // self.page_size)

    @property
    def ring_slots(self) -> int:
        """Slots of the tokens that go round."""
        return -(-self.ring_tokens // self.page_size)

    @property
    def slots(self) -> int:
        """Length of a layer's page table."""
        return self.sink_slots + self.ring_slots

    def first_visible(self, position: int) -> int:
        """Return the oldest position, sink tokens apart, that a query at `position` sees."""
        return max(self.sink_tokens, position - self.window + 1)

    def sink_stretches(self, start: int, stop: int) -> Stretches:
        """Cut the sink positions among `start` to `stop` at page boundaries."""
        page, offset, position, tokens = _cut(start, min(stop, self.sink_tokens), self.page_size)
        return Stretches(page, offset, position, tokens)

    def ring_stretches(self, start: int, stop: int) -> Stretches:
        """Cut the positions among `start` to `stop` that are no sinks at page boundaries."""
        sinks = self.sink_tokens
        page, offset, ring_token, tokens = _cut(max(start, sinks) - sinks, stop - sinks, self.page_size)
        return Stretches(self.sink_slots + page % self.ring_slots, offset, ring_token + sinks, tokens)


def _cut(
    start: int, stop: int, page_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut the tokens from `start` to `stop` into (page, offset, first token, count)."""
    page = np.arange(start // page_size, -(-stop // page_size) if stop > start else start // page_size, dtype=np.int64)
    page_start = page * page_size
    first = np.maximum(page_start, start)
    return page, first - page_start, first, np.minimum(page_start + page_size, stop) - first
