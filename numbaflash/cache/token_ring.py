"""A ring of tokens as they are: written into pages through a page table, and read through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu.paging import RING, gather_tokens, list_runs, scatter_tokens
from .layout import RingLayout
from .pages import PageTable

__all__ = ["TokenRing"]


class TokenRing:
    """The tokens of one layer that are no codes.

    Args:
        layout: Which of them are kept, and where.
        table: Of pages of tokens, (2, kv_heads, page_size, head_dim).

    Attributes:
        length: Tokens seen.
        intact: Oldest position, sink tokens apart, that has not been overwritten. Truncation does not bring back what
            was overwritten, so this only grows.
        dtype: Of the tokens.
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value.
        record_address: Of the ring as compiled functions see it, a RING record.
    """

    def __init__(self, layout: RingLayout, table: PageTable) -> None:
        pool = table.pool
        self.length = 0
        self.intact = layout.sink_tokens
        self.dtype = pool.dtype
        _, self.kv_heads, page_size, self.head_dim = pool.shape
        self._layout = layout
        self._table = table
        record = (
            table.addresses.ctypes.data,
            page_size,
            layout.sink_tokens,
            layout.sink_slots,
            layout.ring_slots,
            self.kv_heads,
            self.head_dim * pool.dtype.itemsize,
        )
        self._record = np.array([record], RING)
        self.record_address = self._record.ctypes.data

    def fork(self) -> TokenRing:
        """Return a twin that shares all pages."""
        twin = TokenRing(self._layout, self._table.fork())
        twin.length, twin.intact = self.length, self.intact
        return twin

    def release(self) -> None:
        """Give all pages back."""
        self._table.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self._table.nbytes

    def reserve(self, tokens: int) -> dict[int, int]:
        """Return pages, by slot, for what the next tokens fall on and others see too, or that has none yet.

        Raises:
            MemoryError: There are no more; nothing has changed.
        """
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
        """Give back what `reserve` returned, in the place of `write`."""
        for page in fresh.values():
            self._table.pool.release(page)

    def write(self, keys: NDArray[Any], values: NDArray[Any], fresh: Mapping[int, int] | None = None) -> None:
        """Append tokens, (T, Hkv, D) each.

        Args:
            keys: Of the storage dtype.
            values: Likewise.
            fresh: What `reserve` returned for them, and then nothing can fail; None: it is asked now.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        start, stop = self.length, self.length + len(keys)
        pool = self._table.pool
        for slot, page in (self.reserve(len(keys)) if fresh is None else fresh).items():
            if self._table[slot] is not None:
                pool.content(page)[:] = self._table.content(slot)
            self._table[slot] = page
        for first, behind in self._pieces(len(keys)):
            self._copy(scatter_tokens, first, behind, keys[first - start :], values[first - start :])
        self.length = stop
        self.intact = max(self.intact, stop - self._layout.ring_tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of the tokens `start` to `stop`: (2, tokens, Hkv, D)."""
        tokens = np.empty((2, stop - start, self.kv_heads, self.head_dim), self.dtype)
        self._copy(gather_tokens, start, stop, *tokens)
        return tokens

    @property
    def max_runs(self) -> int:
        """Rows that `list_runs` may write."""
        return self._layout.slots + 2

    def list_runs(self, start: int, table_address: int) -> int:
        """Write the sink tokens and the ring tokens from `start` on as rows of `KVRuns.table`; return their number."""
        rows: int = list_runs(self.record_address, start, self.length, table_address)
        return rows

    def _copy(self, copy: Any, start: int, stop: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        places = (keys.ctypes.data, *keys.strides[:2], values.ctypes.data, *values.strides[:2])
        copy(self.record_address, start, stop, *places)

    def _pieces(self, tokens: int) -> list[tuple[int, int]]:
        """The positions of the next tokens that stay: sink tokens, and the others."""
        start, stop, sinks = self.length, self.length + tokens, self._layout.sink_tokens
        # What comes before would be overwritten by the same step.
        kept = max(start, stop - self._layout.ring_tokens, sinks)
        return [(start, min(stop, sinks)), (kept, stop)] if start < sinks else [(kept, stop)]
