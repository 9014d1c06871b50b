"""One layer's ring: the page table, and the tokens that are written through it and read through it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import runs
from .layout import RingLayout, Stretches
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

    def fork(self) -> LayerRing:
        """Return a twin that shares all pages."""
        twin = LayerRing(self._layout, self._pool)
        twin.length = self.length
        twin.intact = self.intact
        twin._pages = list(self._pages)
        twin._addresses = self._addresses.copy()
        for page in self._used_pages():
            self._pool.share(page)
        return twin

    def release(self) -> None:
        """Give all pages back."""
        for page in self._used_pages():
            self._pool.release(page)
        self._pages = [_NO_PAGE] * self._layout.slots

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return len(self._used_pages()) * self._pool.page_nbytes

    def write(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Append tokens, (T, Hkv, D) each; all pages that takes are had before the first byte is written."""
        start, stop = self.length, self.length + len(keys)
        kept = max(start, stop - self._layout.ring_tokens)  # what comes before would be overwritten by the same step
        pieces = (self._layout.sink_stretches(start, stop), self._layout.ring_stretches(kept, stop))
        self._own([int(slot) for piece in pieces for slot in piece.slot])
        for piece in pieces:
            for slot, offset, position, tokens in zip(*(column.tolist() for column in piece), strict=True):
                page = self._pool.content(self._pages[slot])
                source = slice(position - start, position - start + tokens)
                page[0, :, offset : offset + tokens] = keys[source].swapaxes(0, 1)
                page[1, :, offset : offset + tokens] = values[source].swapaxes(0, 1)
        self.length = stop
        self.intact = max(self.intact, stop - self._layout.ring_tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of the sink tokens and the ring tokens among `start` to `stop`: (2, tokens, Hkv, D)."""
        pieces = (self._layout.sink_stretches(start, stop), self._layout.ring_stretches(start, stop))
        _, kv_heads, _, head_dim = self._pool.shape
        parts = [np.empty((2, 0, kv_heads, head_dim), self._pool.dtype)]
        for piece in pieces:
            for slot, offset, _, tokens in zip(*(column.tolist() for column in piece), strict=True):
                page = self._pool.content(self._pages[slot])
                parts.append(page[:, :, offset : offset + tokens].swapaxes(1, 2))
        return np.concatenate(parts, axis=1)

    def runs(self, start: int) -> NDArray[np.int64]:
        """Return the sink tokens and the ring tokens from `start` on as rows of `KVRuns.table`."""
        sinks = self._layout.sink_stretches(0, self.length)
        ring = self._layout.ring_stretches(start, self.length)
        if not sinks.slot.size:
            return self._table(ring)
        return np.concatenate((self._table(sinks), self._table(ring)))

    def _table(self, piece: Stretches) -> NDArray[np.int64]:
        _, _, page_size, head_dim = self._pool.shape
        token_stride = head_dim * self._pool.dtype.itemsize
        table = np.empty((piece.slot.size, runs.RUN_FIELDS), np.int64)
        table[:, runs.K_ADDRESS] = self._addresses[piece.slot] + piece.offset * token_stride
        table[:, runs.V_ADDRESS] = table[:, runs.K_ADDRESS] + self._pool.page_nbytes // 2
        table[:, runs.START] = piece.position
        table[:, runs.COUNT] = piece.tokens
        table[:, [runs.K_TOKEN_STRIDE, runs.V_TOKEN_STRIDE]] = token_stride
        table[:, [runs.K_HEAD_STRIDE, runs.V_HEAD_STRIDE]] = token_stride * page_size
        return table

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
