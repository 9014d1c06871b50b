"""One layer's ring: the page table, and the tokens that are written through it and read through it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu.paging import RING, gather_tokens, list_runs, scatter_tokens
from .layout import RingLayout
from .pages import PagePool

__all__ = ["LayerRing"]

_NO_PAGE = -1


class LayerRing:
    """Page table of one layer.

    Attributes:
        length: Tokens seen.
        intact: Oldest position, sink tokens apart, that has not been overwritten. Truncation does not bring back what
            was overwritten, so this only grows.
    """

    def __init__(self, layout: RingLayout, pool: PagePool) -> None:
        self.length = 0
        self.intact = layout.sink_tokens
        self._layout = layout
        self._pool = pool
        self._pages = [_NO_PAGE] * layout.slots
        self._addresses = np.zeros(layout.slots, np.int64)
        _, kv_heads, page_size, head_dim = pool.shape
        record = (
            self._addresses.ctypes.data,
            page_size,
            layout.sink_tokens,
            layout.sink_slots,
            layout.ring_slots,
            kv_heads,
            head_dim * pool.dtype.itemsize,
        )
        self._record = np.array([record], RING)
        self._record_address = self._record.ctypes.data

    def fork(self) -> LayerRing:
        """Return a twin that shares all pages."""
        twin = LayerRing(self._layout, self._pool)
        twin.length = self.length
        twin.intact = self.intact
        twin._pages = list(self._pages)
        twin._addresses[:] = self._addresses
        for page in self._used_pages():
            self._pool.share(page)
        return twin

    def release(self) -> None:
        """Give all pages back."""
        for page in self._used_pages():
            self._pool.release(page)
        self._pages = [_NO_PAGE] * self._layout.slots

    @property
    def raw_intact(self) -> int:
        """Oldest position, sink tokens apart, from which on all tokens are there as they were written."""
        return self.intact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return len(self._used_pages()) * self._pool.page_nbytes

    def write(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Append tokens, (T, Hkv, D) each; all pages that takes are had before the first byte is written."""
        start, stop = self.length, self.length + len(keys)
        sinks = self._layout.sink_tokens
        # What comes before would be overwritten by the same step.
        kept = max(start, stop - self._layout.ring_tokens, sinks)
        pieces = [(start, min(stop, sinks)), (kept, stop)] if start < sinks else [(kept, stop)]
        self._own([slot for piece in pieces for slot in self._layout.slots_between(*piece)])
        for first, behind in pieces:
            self._copy(scatter_tokens, first, behind, keys[first - start :], values[first - start :])
        self.length = stop
        self.intact = max(self.intact, stop - self._layout.ring_tokens)

    def truncate(self, length: int) -> None:
        """Take the layer back to `length` tokens."""
        self.length = length

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of the tokens `start` to `stop`: (2, tokens, Hkv, D)."""
        _, kv_heads, _, head_dim = self._pool.shape
        tokens = np.empty((2, stop - start, kv_heads, head_dim), self._pool.dtype)
        self._copy(gather_tokens, start, stop, *tokens)
        return tokens

    @property
    def max_runs(self) -> int:
        """Rows that `list_runs` may write."""
        return self._layout.slots + 2

    def list_runs(self, start: int, table_address: int) -> int:
        """Write the sink tokens and the ring tokens from `start` on as rows of `KVRuns.table`; return their number."""
        rows: int = list_runs(self._record_address, start, self.length, table_address)
        return rows

    def _copy(self, copy: Any, start: int, stop: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        places = (keys.ctypes.data, *keys.strides[:2], values.ctypes.data, *values.strides[:2])
        copy(self._record_address, start, stop, *places)

    def _used_pages(self) -> list[int]:
        return [page for page in self._pages if page != _NO_PAGE]

    def _own(self, slots: list[int]) -> None:
        """See that every slot has a page which nobody else sees; nothing has changed when that fails."""
        fresh: dict[int, int] = {}
        try:
            for slot in slots:
                page = self._pages[slot]
                if slot not in fresh and (page == _NO_PAGE or self._pool.is_shared(page)):
                    fresh[slot] = self._pool.acquire()
        except MemoryError:
            for page in fresh.values():
                self._pool.release(page)
            raise
        for slot, page in fresh.items():
            shared = self._pages[slot]
            if shared != _NO_PAGE:
                self._pool.content(page)[:] = self._pool.content(shared)
                self._pool.release(shared)
            self._pages[slot] = page
            self._addresses[slot] = self._pool.address(page)
