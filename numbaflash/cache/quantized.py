"""One layer of a quantized cache: pages of codes behind, the newest tokens and the sink tokens in 16 bits.

What a query sees depends on its position alone, not on how tokens were cut into steps. Behind the sink tokens, which
stay in float16 (attention sinks draw a large part of all attention), positions form pages of `page_size`; a query sees
every earlier page of its window as codes, and its own page, up to itself, in float16. So a step quantizes the pages
that it fills before it attends, and its queries are parted by pages.

The newest `rollback + 1` tokens can be queried again, or taken back, only if their pages are still there in float16:
that is what a ring of `rollback + page_size` tokens beside the codes is for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS, contiguous_run
from ..cpu.runs import START
from .layer import LayerRing
from .layout import RingLayout
from .page_format import PageFormat
from .pages import PagePool
from .quantizers import Quantizer

__all__ = ["Closed", "QuantizedLayer", "Segment"]

_NO_PAGE = -1


class Segment(NamedTuple):
    """Queries `start` to `stop` that see the same pages as codes: rows of `KVRuns.table` and `Codes.parameters`."""

    start: int
    stop: int
    table: NDArray[np.int64]
    parameters: NDArray[np.int64]


class Closed(NamedTuple):
    """Pages that a step fills, by their number behind the sink tokens; they belong to nobody's page table yet."""

    first: int
    pages: list[int]


class QuantizedLayer:
    """Page table of one layer; see `LayerRing`, which holds the tokens in float16.

    Args:
        layout: Of the cache.
        page_format: Of the pages of codes.
        pool: Pages of codes, (page_nbytes,) uint8.
        raw: The empty float16 ring, of shape `raw_layout(layout)`.
        quantizer: Fills pages of codes.

    Attributes:
        intact: Oldest position, sink tokens apart, whose page of codes has not been overwritten.
        raw: The tokens in float16.
    """

    def __init__(
        self, layout: RingLayout, page_format: PageFormat, pool: PagePool, raw: LayerRing, quantizer: Quantizer
    ) -> None:
        self.intact = layout.sink_tokens
        self._layout = layout
        self._format = page_format
        self._pool = pool
        self.raw = raw
        self._quantizer = quantizer
        self._pages = [_NO_PAGE] * layout.ring_slots
        self._listed: tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.raw.length

    @property
    def raw_intact(self) -> int:
        """Oldest position, sink tokens apart, from which on all tokens are there in float16."""
        return self.raw.intact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.raw.nbytes + len(self._used_pages()) * self._pool.page_nbytes

    def fork(self) -> QuantizedLayer:
        """Return a twin that shares all pages."""
        twin = QuantizedLayer(self._layout, self._format, self._pool, self.raw.fork(), self._quantizer)
        twin.intact = self.intact
        twin._pages = list(self._pages)
        for page in self._used_pages():
            self._pool.share(page)
        return twin

    def release(self) -> None:
        """Give all pages back."""
        self.raw.release()
        for page in self._used_pages():
            self._pool.release(page)
        self._pages = [_NO_PAGE] * self._layout.ring_slots

    def page_start(self, position: int) -> int:
        """Return the first position of a position's page; 0 among the sink tokens."""
        sinks, size = self._layout.sink_tokens, self._layout.page_size
        return sinks + (position - sinks) // size * size if position >= sinks else 0

    def close_pages(self, keys: NDArray[Any], values: NDArray[Any]) -> Closed:
        """Quantize the pages that new tokens, (T, Hkv, D) float16, would fill; the layer does not change."""
        sinks, size = self._layout.sink_tokens, self._layout.page_size
        first, behind = (max(at - sinks, 0) // size for at in (self.length, self.length + len(keys)))
        if first == behind:
            return Closed(first, [])
        # The first of them may have begun in earlier steps, or in this one behind its sink tokens.
        begin = sinks + first * size
        whole = []
        for old, new in zip(self.raw.read(min(begin, self.length), self.length), (keys, values), strict=True):
            tokens = np.concatenate((old, new[max(begin - self.length, 0) :]))
            whole.append(tokens[: (behind - first) * size].reshape(behind - first, size, *new.shape[1:]))
        pages: list[int] = []
        try:
            for content in self._quantizer.pack(self._format, *whole):
                pages.append(self._pool.acquire())
                self._pool.content(pages[-1])[:] = content
        except MemoryError:
            self.discard(Closed(first, pages))
            raise
        return Closed(first, pages)

    def discard(self, closed: Closed) -> None:
        """Give pages back that `close_pages` returned, and that were not written."""
        for page in closed.pages:
            self._pool.release(page)

    def write(self, keys: NDArray[Any], values: NDArray[Any], closed: Closed) -> None:
        """Append tokens, float16, with the pages that they fill; nothing has changed when that fails."""
        self.raw.write(keys, values)
        for number, page in enumerate(closed.pages, closed.first):
            slot = number % self._layout.ring_slots
            if self._pages[slot] != _NO_PAGE:
                self._pool.release(self._pages[slot])
            self._pages[slot] = page
            self._listed = None
        self.intact = max(self.intact, self.length - self._layout.ring_tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of tokens that are there in float16, (2, tokens, Hkv, D)."""
        return self.raw.read(start, stop)

    def read_page(self, number: int) -> NDArray[np.uint8]:
        """Return a page of codes by its number behind the sink tokens."""
        return self._pool.content(self._pages[number % self._layout.ring_slots])

    def write_page(self, number: int, content: NDArray[np.uint8]) -> None:
        """Put a page of codes that `read_page` returned where there is none."""
        slot = number % self._layout.ring_slots
        self._pages[slot] = self._pool.acquire()
        self._pool.content(self._pages[slot])[:] = content

    def can_truncate(self, length: int) -> bool:
        """Say whether the page that `length` lies in is there in float16, or has no token before it."""
        start = self.page_start(length)
        return start == length or length < self._layout.sink_tokens or start >= self.raw.intact

    def truncate(self, length: int) -> None:
        """Take the layer back to `length` tokens."""
        self.raw.length = length
        # Where a page boundary was gone back to, float16 tokens begin anew there.
        self.raw.intact = min(self.raw.intact, max(length, self._layout.sink_tokens))

    def segments(
        self, start: int, stop: int, keys: NDArray[Any], values: NDArray[Any], closed: Closed
    ) -> list[Segment]:
        """Part queries at `start` to `stop` by pages, and list what each part sees, in order of positions.

        Args:
            start: Of the first query.
            stop: Behind the last one.
            keys: (T, Hkv, D) float16 tokens behind those of the layer.
            values: Likewise.
            closed: The pages that these fill.
        """
        sinks, size = self._layout.sink_tokens, self._layout.page_size
        first = self._first_page(start)
        codes, parameters = self._codes(first, max(stop - 1 - sinks, 0) // size, closed)
        segments = []
        while start < stop:
            # Sink tokens and the page behind them are all in float16.
            page = max(start - sinks, 0) // size
            behind = min(sinks + (page + 1) * size, stop)
            seen = slice(self._first_page(start) - first, page - first)
            before, after = self._raw_runs(sinks + page * size, behind, keys, values)
            table = np.concatenate((before, codes[seen], after))
            of_codes = np.zeros((len(table), 2), np.int64)
            of_codes[len(before) : len(table) - len(after)] = parameters[seen]
            segments.append(Segment(start, behind, table, of_codes))
            start = behind
        return segments

    def _first_page(self, position: int) -> int:
        """The oldest page that a query at `position` sees."""
        return (self._layout.first_visible(position) - self._layout.sink_tokens) // self._layout.page_size

    def _raw_runs(
        self, own: int, stop: int, keys: NDArray[Any], values: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the table for the sink tokens, and for the float16 tokens from `own` to `stop`."""
        sinks, length = self._layout.sink_tokens, self.length
        stored = np.empty((self.raw.max_runs, RUN_FIELDS), np.int64)
        stored = stored[: self.raw.list_runs(own, stored.ctypes.data)]
        behind_sinks = int(np.searchsorted(stored[:, START], sinks))
        new: list[list[tuple[int, ...]]] = [[], []]
        for rows, begin, end in ((new[0], length, min(sinks, stop)), (new[1], max(own, length), stop)):
            if begin < end and len(keys):
                taken = slice(begin - length, end - length)
                rows.append(contiguous_run(keys[taken], values[taken], begin))
        before, after = (np.array(rows, np.int64).reshape(-1, RUN_FIELDS) for rows in new)
        return np.concatenate((stored[:behind_sinks], before)), np.concatenate((stored[behind_sinks:], after))

    def _codes(self, first: int, behind: int, closed: Closed) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the table, and of the parameters, of the pages of codes `first` to `behind`."""
        which = first, behind
        if self._listed and self._listed[0] == which and not closed.pages:
            return self._listed[1:]
        numbers = np.arange(first, behind)
        pages = [
            closed.pages[number - closed.first]
            if closed.first <= number < closed.first + len(closed.pages)
            else self._pages[number % self._layout.ring_slots]
            for number in range(first, behind)
        ]
        keys = np.array([self._pool.address(page) for page in pages], np.int64)
        size, shape = self._layout.page_size, self._format
        table = np.empty((len(pages), RUN_FIELDS), np.int64)
        table[:, 0], table[:, 1] = keys, keys + shape.kv_heads * shape.key_nbytes
        table[:, START] = self._layout.sink_tokens + numbers * size
        table[:, 3:] = size, shape.row_nbytes, shape.key_nbytes, shape.row_nbytes, shape.value_nbytes
        parameters = table[:, :2] + shape.codes_nbytes
        if not closed.pages:
            self._listed = which, table, parameters
        return table, parameters

    def _used_pages(self) -> list[int]:
        return [page for page in self._pages if page != _NO_PAGE]
