"""One layer of a quantized cache: pages of codes behind, the newest tokens and the sink tokens in 16 bits.

What a query sees depends on its position alone, not on how tokens were cut into steps. Behind the sink tokens, which
stay in float16 (attention sinks draw a large part of all attention), positions form pages of `page_size`; a query sees
every earlier page of its window as codes, and its own page, up to itself, in float16. So a step quantizes the pages
that it fills before it attends, and its queries are parted by pages.

The newest `rollback + 1` tokens can be queried again, or taken back, only if their pages are still there in float16:
that is what a ring of `rollback + page_size` tokens beside the codes is for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS
from ..cpu.code_paging import CODE_PAGES, list_seen_runs
from ..cpu.fit import all_finite
from ..problem import FLOAT16
from .layer import HostLayer, NewTokens, Segment
from .layout import RingLayout
from .page_format import PageFormat
from .pages import PagePool, PageTable
from .quantizers import Quantizer
from .token_ring import TokenRing

__all__ = ["QuantizedLayer"]


# A number above that of any page.
_NO_PAGE = 1 << 62


class QuantizedLayer(HostLayer):
    """A layer of pages of codes, and a ring of tokens in float16.

    Args:
        index: Of the layer.
        layout: Of the cache.
        ring: The empty float16 ring, of shape `raw_layout(layout)`.
        page_format: Of the pages of codes.
        pool: Pages of codes, (page_nbytes,) uint8.
        quantizer: Fills them.
    """

    def __init__(
        self,
        index: int,
        layout: RingLayout,
        ring: TokenRing,
        page_format: PageFormat,
        pool: PagePool,
        quantizer: Quantizer,
    ) -> None:
        super().__init__(index, layout, ring)
        self.page_format: PageFormat = page_format
        self._intact = layout.sink_tokens
        self._quantizer = quantizer
        self._table = PageTable(pool, layout.ring_slots)
        self._addresses = np.zeros(layout.ring_slots, np.int64)
        record = (
            self._addresses.ctypes.data,
            layout.ring_slots,
            page_format.row_nbytes,
            page_format.key_nbytes,
            page_format.value_nbytes,
            page_format.kv_heads * page_format.key_nbytes,
            page_format.codes_nbytes,
        )
        self._record = np.array([record], CODE_PAGES)
        self._record_address = self._record.ctypes.data

    @property
    def intact(self) -> int:
        """Oldest position, sink tokens apart, whose page of codes has not been overwritten."""
        return self._intact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.ring.nbytes + self._table.nbytes

    def fork(self) -> QuantizedLayer:
        """Return a twin that shares all pages."""
        ring, pool = self.ring.fork(), self._table.pool
        twin = QuantizedLayer(self.index, self.layout, ring, self.page_format, pool, self._quantizer)
        twin._intact = self._intact
        twin._table = self._table.fork()
        twin._addresses[:] = self._addresses
        return twin

    def release(self) -> None:
        """Give all pages back."""
        self.ring.release()
        self._table.release()

    def prepare(self, keys: NDArray[Any], values: NDArray[Any]) -> NewTokens:
        """Fold and round new tokens to float16, and quantize the pages that they fill.

        Raises:
            ValueError: Some are not finite in float16.
        """
        folded = _stored("k", self._quantizer.fold_keys(self.index, keys)), _stored("v", values)
        return NewTokens(*folded, *self._fill_pages(*folded))

    def fold_queries(self, q: NDArray[Any]) -> NDArray[Any]:
        """Return queries as they meet what the quantizer has made of keys."""
        return self._quantizer.fold_queries(self.index, q)

    def discard(self, new: NewTokens) -> None:
        """Give back all pages of new tokens, those of codes as well."""
        super().discard(new)
        self._give_back(new.pages)

    def write(self, new: NewTokens) -> None:
        """Append new tokens with the pages that they fill."""
        self.ring.write(new.keys, new.values, new.fresh)
        for number, page in enumerate(new.pages, new.first_page):
            self._put(number, page)
        self._intact = max(self._intact, self.length - self.layout.ring_tokens)

    def check_queries(self, start: int) -> None:
        """See that everything is there that the queries from `start` on see, their own pages in float16."""
        super().check_queries(start)
        if self._page_start(start) < self.raw_intact and start >= self.layout.sink_tokens:
            raise ValueError(
                f"q must have tokens whose pages are still there in float16, those from {self.raw_intact} on; "
                f"got the newest {self.length - start} of {self.length}"
            )

    def check_truncate(self, length: int) -> None:
        """See that the layer can be taken back to `length` tokens: the page they end in must be there in float16."""
        super().check_truncate(length)
        start = self._page_start(length)
        if not (start == length or length < self.layout.sink_tokens or start >= self.raw_intact):
            raise ValueError(
                f"length must be {self.raw_intact} or more, or {start} where a page begins: "
                f"layer {self.index} holds what lies between as codes only; got {length}"
            )

    def truncate(self, length: int) -> None:
        """Take the layer back to `length` tokens, which `check_truncate` has allowed."""
        super().truncate(length)
        # Where a page boundary was gone back to, float16 tokens begin anew there.
        self.ring.intact = min(self.ring.intact, max(length, self.layout.sink_tokens))

    def read_page(self, number: int) -> NDArray[np.uint8]:
        """Return a page of codes by its number behind the sink tokens."""
        return self._table.content(self._slot(number))

    def restore_pages(self, pages: Iterable[tuple[int, NDArray[np.uint8]]], intact: int) -> None:
        """Fill an empty page table.

        Args:
            pages: Number behind the sink tokens, and what `read_page` returned.
            intact: As the property.
        """
        for number, content in pages:
            page = self._table.pool.acquire()
            self._table.pool.content(page)[:] = content
            self._put(number, page)
        self._intact = intact

    def segments(self, start: int, stop: int, new: NewTokens) -> list[Segment]:
        """Part queries at `start` to `stop` by pages, and list what each part sees, in order of positions."""
        sinks, size, length = self.layout.sink_tokens, self.layout.page_size, self.length
        keys, values = new.keys, new.values
        tokens = (keys.ctypes.data, *keys.strides[:2], values.ctypes.data, *values.strides[:2])
        new_pages = np.array([self._table.pool.address(page) for page in new.pages], np.int64)
        fresh = (new.first_page, new_pages.ctypes.data) if new.pages else (_NO_PAGE, 0)
        segments = []
        while start < stop:
            # Sink tokens and the page behind them are all in float16.
            own = max(start - sinks, 0) // size
            behind = min(sinks + (own + 1) * size, stop)
            first = self._first_page(start)
            most = self.layout.sink_slots + own - first + 3
            table, parameters = np.empty((most, RUN_FIELDS), np.int64), np.empty((most, 2), np.int64)
            rows = list_seen_runs(
                self.ring.record_address,
                self._record_address,
                first,
                own,
                *fresh,
                length,
                behind,
                *tokens,
                table.ctypes.data,
                parameters.ctypes.data,
            )
            segments.append(Segment(start, behind, table[:rows], parameters[:rows]))
            start = behind
        return segments

    def _first_page(self, position: int) -> int:
        """The oldest page that a query at `position` sees."""
        return (self.layout.first_visible(position) - self.layout.sink_tokens) // self.layout.page_size

    def _fill_pages(self, keys: NDArray[Any], values: NDArray[Any]) -> tuple[int, list[int]]:
        """Quantize the pages that new tokens in float16 fill: number of the first, and all of them."""
        sinks, size = self.layout.sink_tokens, self.layout.page_size
        first, behind = (max(at - sinks, 0) // size for at in (self.length, self.length + len(keys)))
        if first == behind:
            return first, []
        # The first of them may have begun in earlier steps, or in this one behind its sink tokens.
        begin = sinks + first * size
        whole = []
        for old, new in zip(self.ring.read(min(begin, self.length), self.length), (keys, values), strict=True):
            tokens = np.concatenate((old, new[max(begin - self.length, 0) :]))
            whole.append(tokens[: (behind - first) * size].reshape(behind - first, size, *new.shape[1:]))
        pool, pages = self._table.pool, list[int]()
        try:
            for content in self._quantizer.pack(self.page_format, *whole):
                pages.append(pool.acquire())
                pool.content(pages[-1])[:] = content
        except MemoryError:
            self._give_back(pages)
            raise
        return first, pages

    def _give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._table.pool.release(page)

    def _page_start(self, position: int) -> int:
        """The first position of a position's page; 0 among the sink tokens."""
        sinks, size = self.layout.sink_tokens, self.layout.page_size
        return sinks + (position - sinks) // size * size if position >= sinks else 0

    def _put(self, number: int, page: int) -> None:
        """Give a page, by its number behind the sink tokens, its slot."""
        slot = self._slot(number)
        self._table[slot] = page
        self._addresses[slot] = self._table.pool.address(page)

    def _slot(self, number: int) -> int:
        """The slot of a page by its number behind the sink tokens."""
        return number % self.layout.ring_slots


def _stored(name: str, given: NDArray[Any]) -> NDArray[Any]:
    """Round to float16, which must be finite."""
    if given.dtype == FLOAT16:
        stored = np.ascontiguousarray(given)
    else:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(given, FLOAT16)
    if not all_finite(stored.reshape(-1).view(np.uint16)):
        row, head, _ = (int(axis[0]) for axis in np.nonzero(~np.isfinite(stored)))
        raise ValueError(
            f"{name} must be finite in float16 to be quantized, got {given[row, head].max()} or NaN "
            f"among token {row}, head {head}"
        )
    return stored
