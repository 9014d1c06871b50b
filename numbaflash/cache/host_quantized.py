"""A quantized layer in host memory: the CPU's kernels read its codes, and its tokens in float16, as runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS
from ..cpu.code_paging import CodePages, list_seen_runs
from ..cpu.record import address_of
from .layer import HostLayer, NewTokens, Segment
from .layout import RingLayout
from .page_format import PageFormat
from .pages import PageTable
from .quantized import QuantizedLayer
from .quantizers import Quantizer
from .token_ring import TokenRing

__all__ = ["HostQuantizedLayer"]


# A number above that of any page.
_NO_PAGE = 1 << 62


class HostQuantizedLayer(QuantizedLayer, HostLayer):
    """A `QuantizedLayer` in host memory."""

    ring: TokenRing
    table: PageTable

    def __init__(
        self,
        index: int,
        layout: RingLayout,
        ring: TokenRing,
        page_format: PageFormat,
        table: PageTable,
        quantizer: Quantizer,
    ) -> None:
        super().__init__(index, layout, ring, page_format, table, quantizer)
        self._record = CodePages(
            pages=table.addresses.ctypes.data,
            slots=layout.ring_slots,
            row_bytes=page_format.row_nbytes,
            key_head=page_format.key_nbytes,
            value_head=page_format.value_nbytes,
            values=page_format.kv_heads * page_format.key_nbytes,
            parameters=page_format.codes_nbytes,
        )

    def prepare(self, keys: NDArray[Any], values: NDArray[Any]) -> NewTokens:
        """Fold and round new tokens to float16, and quantize the pages that they fill.

        Raises:
            ValueError: Some are not finite in float16.
            MemoryError: There are no more pages.
        """
        stored = self.fold_and_round(keys, values)
        first, contents = self.quantize_full_pages(*stored)
        if not len(contents):
            return NewTokens(*stored, first)
        pool, pages = self.table.pool, list[int]()
        try:
            for content in contents:
                pages.append(pool.acquire())
                pool.content(pages[-1])[:] = content
        except MemoryError:
            self._give_back(pages)
            raise
        return NewTokens(*stored, first, pages)

    def fold_queries(self, q: NDArray[Any]) -> NDArray[Any]:
        """Return queries as they meet what the quantizer has made of keys."""
        return self.quantizer.fold_queries(self.index, q)

    def discard(self, new: NewTokens) -> None:
        """Give back all pages of new tokens, those of codes as well."""
        super().discard(new)
        self._give_back(list(new.pages))

    def write(self, new: NewTokens) -> None:
        """Append new tokens with the pages that they fill."""
        self.ring.write(new.keys, new.values, new.fresh)
        for number, page in enumerate(new.pages, new.first_page):
            self.table[self.slot_of(number)] = page
        self.overwritten_by_codes()

    def segments(self, start: int, stop: int, new: NewTokens) -> list[Segment]:
        """Part queries at `start` to `stop` by pages, and list what each part sees, in order of positions."""
        length, keys, values = self.length, new.keys, new.values
        tokens = (keys.ctypes.data, *keys.strides[:2], values.ctypes.data, *values.strides[:2])
        fresh = _NO_PAGE, 0
        if new.pages:
            new_pages = np.array([self.table.pool.address(page) for page in new.pages], np.int64)
            fresh = new.first_page, address_of(new_pages)
        segments = []
        for own, begin, behind in self.layout.by_pages(start, stop):
            first = self.first_page(begin)
            most = self.layout.sink_slots + own - first + 3
            # Side by side, for NumPy takes its time for each array.
            numbers = np.empty(most * (RUN_FIELDS + 2), np.int64)
            address = address_of(numbers)
            rows = list_seen_runs(
                self.ring.record.address,
                self._record.address,
                first,
                own,
                *fresh,
                length,
                behind,
                *tokens,
                address,
                address + 8 * most * RUN_FIELDS,
            )
            table, parameters = numbers[: rows * RUN_FIELDS], numbers[most * RUN_FIELDS :][: 2 * rows]
            segments.append(Segment(begin, behind, table.reshape(rows, RUN_FIELDS), parameters.reshape(rows, 2)))
        return segments

    def _give_back(self, pages: list[int]) -> None:
        for page in pages:
            self.table.pool.release(page)
