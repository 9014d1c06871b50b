"""The arithmetic of the ring: which positions are visible, and in which slot of the page table each one lies.

Positions count a layer's tokens from 0. The first `sink_tokens` lie in slots of their own and stay; those behind them
go round: ring token r = position - sink_tokens lies in ring slot `(r // page_size) % ring_slots`, at `r % page_size`.
The ring holds the window and `rollback` tokens more, so that so many of the newest can be taken back with the whole
window still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["RingLayout", "raw_layout"]


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

    @cached_property
    def window(self) -> int:
        """Newest tokens that a query sees, its own included."""
        return self.capacity - self.sink_tokens

    @cached_property
    def ring_tokens(self) -> int:
        """Newest tokens that are kept."""
        return self.window + self.rollback

    @cached_property
    def sink_slots(self) -> int:
        """Slots of the sink tokens; they stand first in the page table."""
        return -(-self.sink_tokens // self.page_size)

    @cached_property
    def ring_slots(self) -> int:
        """Slots of the tokens that go round."""
        return -(-self.ring_tokens // self.page_size)

    @cached_property
    def slots(self) -> int:
        """Length of a layer's page table."""
        return self.sink_slots + self.ring_slots

    def first_visible(self, position: int) -> int:
        """Return the oldest position, sink tokens apart, that a query at `position` sees."""
        return max(self.sink_tokens, position - self.window + 1)

    def page_around(self, position: int) -> tuple[int, int]:
        """Return the first position, and that behind the last one, that share a page with a position."""
        behind = 0 if position < self.sink_tokens else self.sink_tokens
        begin = position - (position - behind) % self.page_size
        end = begin + self.page_size
        return begin, min(end, self.sink_tokens) if position < self.sink_tokens else end

    def slots_between(self, start: int, stop: int) -> list[int]:
        """Return the slots of the positions `start` to `stop`, all sink tokens or none; one may come twice."""
        behind, first_slot, slots = 0, 0, self.sink_slots
        if start >= self.sink_tokens:
            behind, first_slot, slots = self.sink_tokens, self.sink_slots, self.ring_slots
        pages = range((start - behind) // self.page_size, -(-(stop - behind) // self.page_size))
        return [first_slot + page % slots for page in pages]

    def by_pages(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Part the positions `start` to `stop` by the pages that they stand in, sink tokens with the first page behind.

        Returns:
            Of each part the number of its page behind the sink tokens, its first position and that behind it.
        """
        parts = []
        while start < stop:
            page = max(start - self.sink_tokens, 0) // self.page_size
            behind = min(self.sink_tokens + (page + 1) * self.page_size, stop)
            parts.append((page, start, behind))
            start = behind
        return parts


def raw_layout(layout: RingLayout) -> RingLayout:
    """Return the shape of the float16 ring beside a quantized one.

    It holds the sink tokens, and the whole pages that the newest `rollback + 1` tokens lie in.
    """
    capacity = layout.sink_tokens + layout.page_size
    return RingLayout(capacity, layout.sink_tokens, layout.page_size, layout.rollback)
