"""A quantized layer in host memory: the CPU's kernels read its codes, and its tokens in float16, as runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..cpu.code_paging import CodePages
from .layout import RingLayout
from .page_format import PageFormat
from .pages import PageTable
from .quantized import QuantizedLayer
from .quantizers import Quantizer
from .token_ring import TokenRing

__all__ = ["FilledPages", "HostQuantizedLayer"]


class FilledPages(NamedTuple):
    """Pages of codes that new tokens fill, which are in no page table yet: the first one's number, and all of them."""

    first: int
    pages: Sequence[int]


class HostQuantizedLayer(QuantizedLayer):
    """A `QuantizedLayer` in host memory.

    Attributes:
        record: The layer as compiled functions see it.
    """

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
        self.record = CodePages(
            ring=ring.record.address,
            pages=table.addresses.ctypes.data,
            slots=layout.ring_slots,
            row_bytes=page_format.row_nbytes,
            key_head=page_format.key_nbytes,
            value_head=page_format.value_nbytes,
            values=page_format.kv_heads * page_format.key_nbytes,
            parameters=page_format.codes_nbytes,
            window=layout.window,
        )

    def fill_pages(self, keys: NDArray[Any], values: NDArray[Any]) -> FilledPages:
        """Quantize the pages that new tokens fill, (T, Hkv, D) in float16 as the layer is to hold them.

        Raises:
            MemoryError: There are no more pages.
        """
        first, contents = self.quantize_full_pages(keys, values)
        pool, pages = self.table.pool, list[int]()
        try:
            for content in contents:
                pages.append(pool.acquire())
                pool.content(pages[-1])[:] = content
        except MemoryError:
            self.give_back(FilledPages(first, pages))
            raise
        return FilledPages(first, pages)

    def give_back(self, filled: FilledPages) -> None:
        """Give back what `fill_pages` returned, in the place of `place`."""
        for page in filled.pages:
            self.table.pool.release(page)

    def place(self, filled: FilledPages) -> None:
        """Put pages in their slots, whose tokens the ring has got now."""
        for number, page in enumerate(filled.pages, filled.first):
            self.table[self.slot_of(number)] = page

    def count_parts(self, queries: int, new: int) -> int:
        """Return into how many pages so many of the last tokens fall, `new` tokens that follow among them."""
        stop = self.length + new
        return self._page_of(stop - 1) - self._page_of(stop - queries) + 1

    def max_runs(self, new: int) -> int:
        """Return how many runs the queries of one page may see, with `new` tokens that follow."""
        raw, codes = self.layout.sink_slots, min(self.layout.ring_slots, self._page_of(self.length + new) + 1)
        return raw + codes + 3

    def _page_of(self, position: int) -> int:
        """The number of a position's page behind the sink tokens; those go with the first."""
        return max(position - self.layout.sink_tokens, 0) // self.layout.page_size
