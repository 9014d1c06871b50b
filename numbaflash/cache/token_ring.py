"""A ring of tokens as they are: written into pages through a page table, and read through it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS, Codes, KVRuns, Visibility
from ..cpu.paging import RingRecord, gather_tokens, list_rings, scatter_tokens
from ..cpu.record import address_of, address_of_array
from .layout import RingLayout
from .pages import PageTable

__all__ = ["RingBatch", "TokenRing"]

_NONE: Mapping[int, int] = MappingProxyType({})


class TokenRing:
    """The tokens of one layer that are no codes.

    Args:
        layout: Which of them are kept, and where.
        table: Of pages of tokens, (2, kv_heads, page_size, head_dim).

    Attributes:
        intact: Oldest position, sink tokens apart, that has not been overwritten. Truncation does not bring back what
            was overwritten, so this only grows.
        dtype: Of the tokens.
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value.
        record: The ring as compiled functions see it.
    """

    def __init__(self, layout: RingLayout, table: PageTable) -> None:
        pool = table.pool
        self.intact = layout.sink_tokens
        self.dtype = pool.dtype
        _, self.kv_heads, page_size, self.head_dim = pool.shape
        self._layout = layout
        self._table = table
        self._own_page = 0, 0  # positions of a page that nobody shares
        self.record = RingRecord(
            pages=table.addresses.ctypes.data,
            page_size=page_size,
            sink_tokens=layout.sink_tokens,
            sink_slots=layout.sink_slots,
            ring_slots=layout.ring_slots,
            kv_heads=self.kv_heads,
            row_bytes=self.head_dim * pool.dtype.itemsize,
            window=layout.window,
            ring_tokens=layout.ring_tokens,
        )

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.record["length"]

    @length.setter
    def length(self, tokens: int) -> None:
        self.record["length"] = tokens

    def fork(self) -> TokenRing:
        """Return a twin that shares all pages."""
        twin = TokenRing(self._layout, self._table.fork())
        twin.length, twin.intact = self.length, self.intact
        self._own_page = 0, 0
        return twin

    def release(self) -> None:
        """Give all pages back."""
        self._table.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self._table.nbytes

    def reserve(self, tokens: int) -> Mapping[int, int]:
        """Return pages, by slot, for what the next tokens fall on and others see too, or that has none yet.

        Raises:
            MemoryError: There are no more; nothing has changed.
        """
        begin, behind = self._own_page
        if begin <= self.length and self.length + tokens <= behind:
            return _NONE
        pool = self._table.pool
        fresh: dict[int, int] = {}
        try:
            for slot in [slot for piece in self._pieces(tokens) for slot in self._layout.slots_between(*piece)]:
                page = self._table[slot]
                if slot not in fresh and (page is None or pool.is_shared(page)):
                    fresh[slot] = pool.acquire()
        except BaseException:
            self.give_back(fresh)
            raise
        return fresh

    def give_back(self, fresh: Mapping[int, int]) -> None:
        """Give back what `reserve` returned, where nothing is written."""
        for page in fresh.values():
            self._table.pool.release(page)

    def write(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Append tokens, (T, Hkv, D) each, of the storage dtype.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        batch = RingBatch([self], keys[None], values[None])
        batch.write(batch.reserve())

    def place(self, fresh: Mapping[int, int], tokens: int) -> None:
        """Put pages that `reserve` returned for the next tokens in their slots, with what others see there."""
        if fresh:
            content = self._table.pool.content
            for slot, page in fresh.items():
                if self._table[slot] is not None:
                    content(page)[:] = self._table.content(slot)
                self._table[slot] = page
        stop = self.length + tokens
        begin, behind = self._own_page
        if tokens and not begin < stop <= behind:
            self._own_page = self._layout.page_around(stop - 1)
        self.intact = max(self.intact, stop - self._layout.ring_tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of the tokens `start` to `stop`: (2, tokens, Hkv, D)."""
        tokens = np.empty((2, stop - start, self.kv_heads, self.head_dim), self.dtype)
        token, head = tokens.strides[1:3]
        keys, values = (half.ctypes.data for half in tokens)
        gather_tokens(self.record.address, start, stop, keys, token, head, values, token, head)
        return tokens

    @property
    def max_runs(self) -> int:
        """Runs that its tokens may make."""
        return self._layout.slots + 2

    def _pieces(self, tokens: int) -> list[tuple[int, int]]:
        """The positions of the next tokens that stay: sink tokens, and the others."""
        start, stop, sinks = self.length, self.length + tokens, self._layout.sink_tokens
        # What comes before would be overwritten by the same step.
        kept = max(start, stop - self._layout.ring_tokens, sinks)
        return [(start, min(stop, sinks)), (kept, stop)] if start < sinks else [(kept, stop)]


class RingBatch:
    """Rings of several caches, and tokens that follow those in them: none, or as many for each.

    Args:
        rings: N of them, alike in heads, head_dim and dtype.
        keys: (N, T, Hkv, D), of the rings' dtype.
        values: Likewise.

    Attributes:
        places: Address of the keys, bytes from sequence to sequence, token to token and head to head; and of values.
    """

    def __init__(self, rings: Sequence[TokenRing], keys: NDArray[Any], values: NDArray[Any]) -> None:
        self._rings = rings
        self._tokens = keys.shape[1]
        self._records = array("q", [ring.record.address for ring in rings])
        self._arrays = keys, values  # what `places` are the addresses of
        self.places = (*_place(keys), *_place(values))

    def seen_by_last(self, queries: int) -> tuple[KVRuns, Visibility]:
        """Say what the queries of the last so many tokens see, of the rings and the tokens that follow."""
        sequences = len(self._rings)
        rows = sum([ring.max_runs for ring in self._rings]) + sequences
        # Side by side, for NumPy takes its time for each array.
        numbers = np.empty(5 * sequences + 1 + rows * RUN_FIELDS, np.int64)
        address, bounds_at, table_at = address_of(numbers), 4 * sequences, 5 * sequences + 1
        used = list_rings(
            address_of(self._records),
            sequences,
            queries,
            self._tokens,
            *self.places,
            address,
            address + 8 * bounds_at,
            address + 8 * table_at,
        )
        table = numbers[table_at : table_at + used * RUN_FIELDS].reshape(used, RUN_FIELDS)
        runs = self.runs(table, numbers[bounds_at:table_at])
        return runs, Visibility.of_rows(numbers[:bounds_at].reshape(4, sequences))

    def runs(self, table: NDArray[np.int64], bounds: NDArray[np.int64], codes: Codes | None = None) -> KVRuns:
        """Return runs of such tokens as the rings hold."""
        ring = self._rings[0]
        return KVRuns(table, bounds, ring.dtype, ring.kv_heads, ring.head_dim, ring.head_dim, codes)

    def reserve(self) -> list[Mapping[int, int]]:
        """Return what each ring's `reserve` returns for its tokens.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        fresh: list[Mapping[int, int]] = []
        try:
            for ring in self._rings:
                pages = ring.reserve(self._tokens)
                fresh.append(pages)
        except BaseException:
            for ring, pages in zip(self._rings, fresh, strict=False):
                ring.give_back(pages)
            raise
        return fresh

    def write(self, fresh: Sequence[Mapping[int, int]]) -> None:
        """Append the tokens, with what `reserve` returned; it cannot fail."""
        for ring, pages in zip(self._rings, fresh, strict=True):
            ring.place(pages, self._tokens)
        scatter_tokens(address_of(self._records), len(self._rings), self._tokens, *self.places)


def _place(tokens: NDArray[Any]) -> tuple[int, ...]:
    """Where tokens (N, T, Hkv, D) lie: the first one's address, and the strides of what its rows are counted by."""
    return address_of_array(tokens), *tokens.strides[:3]
