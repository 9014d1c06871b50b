"""What a step over pages is told: what its sequences have in common, and where pages and queries of each are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .codes import CodeFormat
from .row_elements import PIECE

__all__ = [
    "MAX_POSITION",
    "Layout",
    "PagedCodes",
    "PagedLayer",
    "PagedSequence",
    "Stretch",
    "padded",
    "stretches",
]

MAX_POSITION = 2**31 - 2**20
"""Most tokens of a sequence: kernels reckon positions in 32 bits."""


class Layout(Protocol):
    """Which tokens of a sequence stay, and in which slots (`numbaflash.cache.layout.RingLayout`)."""

    @property
    def sink_tokens(self) -> int:
        """First tokens, which are never overwritten."""

    @property
    def page_size(self) -> int:
        """Tokens of a page, a power of two."""

    @property
    def window(self) -> int:
        """Newest tokens that a query sees, its own included."""

    @property
    def ring_tokens(self) -> int:
        """Newest tokens that are kept."""

    @property
    def sink_slots(self) -> int:
        """Slots of the sink tokens, first in the page table."""

    @property
    def ring_slots(self) -> int:
        """Slots of the tokens that go round."""

    def by_pages(self, start: int, stop: int) -> Sequence[tuple[int, int, int]]:
        """Part positions by the pages that they stand in: number of the page, first position, and that behind."""


@dataclass(frozen=True)
class PagedLayer:
    """What all sequences of a launch have in common.

    A page is (2, kv_heads, its sequence's page_size, `padded(head_dim)`), keys then values, at a multiple of 16 bytes;
    padding is 0.

    Attributes:
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value; a multiple of 32 where there are codes.
        dtype: Of what pages hold.
        codes: How pages of codes lie, beside those of `dtype`, float16; None: there are none. Then a query sees the
            sink tokens and its own page, up to itself, in `dtype`, and all pages between as codes.
    """

    kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]
    codes: CodeFormat | None = None


class PagedCodes(NamedTuple):
    """A sequence's pages of codes.

    Attributes:
        table: Device address of their page table: page p, by its number behind the sink tokens, is in slot p % slots.
        slots: Length of the table.
        window: Newest tokens that a query sees, its own included, be they codes or not.
    """

    table: int
    slots: int
    window: int


class PagedSequence(NamedTuple):
    """One sequence of a launch.

    Attributes:
        table: Device address of its page table: (slots,) int64 addresses.
        layout: Its ring.
        length: Tokens in its pages; position of the step's first token.
        start: Position of the first query.
        codes: Its pages of codes; those that the step fills are among them already.
    """

    table: int
    layout: Layout
    length: int
    start: int
    codes: PagedCodes | None = None

    @property
    def window(self) -> int:
        """Newest tokens that a query sees, its own included."""
        return self.layout.window if self.codes is None else self.codes.window


class Stretch(NamedTuple):
    """Queries of one sequence that see the same pages.

    Attributes:
        entry: The sequence's number.
        start: Position of the first query.
        stop: Position behind the last one.
        first_page: Of codes that the first query sees, by its number behind the sink tokens; 0 without codes.
        own_page: That the queries stand in, likewise.
    """

    entry: int
    start: int
    stop: int
    first_page: int = 0
    own_page: int = 0


def padded(head_dim: int) -> int:
    """Return the elements of a row in a page: whole 16 bytes in every dtype."""
    return -(-head_dim // PIECE) * PIECE


def stretches(sequences: Sequence[PagedSequence], tokens: int) -> list[Stretch]:
    """Part the queries of all sequences by what they see; that of the first ones of sequence n is number n."""
    parts: list[list[Stretch]] = []
    for entry, sequence in enumerate(sequences):
        layout, start, stop = sequence.layout, sequence.start, sequence.start + tokens
        if sequence.codes is None:
            parts.append([Stretch(entry, start, stop)])
            continue
        parts.append([])
        for own, first, behind in layout.by_pages(start, stop):
            oldest = max(layout.sink_tokens, first - sequence.window + 1)
            parts[-1].append(Stretch(entry, first, behind, (oldest - layout.sink_tokens) // layout.page_size, own))
    return [part[0] for part in parts] + [stretch for part in parts for stretch in part[1:]]
