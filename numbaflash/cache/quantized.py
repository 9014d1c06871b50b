"""One layer of a quantized cache: pages of codes behind, the newest tokens and the sink tokens in 16 bits.

What a query sees depends on its position alone, not on how tokens were cut into steps. Behind the sink tokens, which
stay in float16 (attention sinks draw a large part of all attention), positions form pages of `page_size`; a query sees
every earlier page of its window as codes, and its own page, up to itself, in float16. So a step quantizes the pages
that it fills before it attends, and its queries are parted by pages.

The newest `rollback + 1` tokens can be queried again, or taken back, only if their pages are still there in float16:
that is what a ring of `rollback + page_size` tokens beside the codes is for.

Here is what holds wherever the pages lie: in host memory (`host_quantized.py`), or on a device
(`device_quantized.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..problem import FLOAT16
from .layer import Layer, Ring
from .layout import RingLayout
from .page_format import PageFormat
from .quantizers import Quantizer

__all__ = ["CodeTable", "QuantizedLayer", "check_finite", "in_float16"]


class CodeTable(Protocol):
    """Pages of codes by their slots."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""

    def fork(self) -> Self:
        """Return a twin that shares all pages."""

    def release(self) -> None:
        """Give all pages back."""

    def read(self, slot: int) -> NDArray[np.uint8]:
        """Return a copy of the page of a slot that has one."""

    def fill(self, slot: int, content: NDArray[np.uint8]) -> None:
        """Put a new page there, with this content.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """


class QuantizedLayer(Layer):
    """A layer of pages of codes, and a ring of tokens in float16.

    Args:
        index: Of the layer.
        layout: Of the cache.
        ring: The float16 ring, of shape `raw_layout(layout)`.
        page_format: Of the pages of codes.
        table: Those pages, in `layout.ring_slots` slots.
        quantizer: Fills them.
    """

    page_format: PageFormat

    def __init__(
        self,
        index: int,
        layout: RingLayout,
        ring: Ring,
        page_format: PageFormat,
        table: CodeTable,
        quantizer: Quantizer,
    ) -> None:
        super().__init__(index, layout, ring)
        self.page_format = page_format
        self.table = table
        self.quantizer = quantizer
        self._intact = layout.sink_tokens

    @property
    def intact(self) -> int:
        """Oldest position, sink tokens apart, whose page of codes has not been overwritten."""
        return self._intact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.ring.nbytes + self.table.nbytes

    def fork(self) -> Self:
        """Return a twin that shares all pages."""
        ring, table = self.ring.fork(), self.table.fork()
        twin = type(self)(self.index, self.layout, ring, self.page_format, table, self.quantizer)
        twin._intact = self._intact
        return twin

    def release(self) -> None:
        """Give all pages back."""
        self.ring.release()
        self.table.release()

    def fold_and_round(self, keys: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return new tokens, (T, Hkv, D), as the layer holds them: folded, in float16.

        Raises:
            ValueError: Some are not finite in float16.
        """
        keys, values = in_float16(self.quantizer.fold_keys(self.index, keys)), in_float16(values)
        check_finite("k", keys)
        check_finite("v", values)
        return keys, values

    def fills_pages(self, tokens: int) -> bool:
        """Return whether so many new tokens fill a page."""
        first, behind = self._filled_by(tokens)
        return first < behind

    def quantize_full_pages(self, keys: NDArray[Any], values: NDArray[Any]) -> tuple[int, NDArray[np.uint8]]:
        """Return the pages that new tokens fill, which `fold_and_round` returned; the layer does not change.

        Returns:
            The number of the first one behind the sink tokens, and all of them, (pages, page_nbytes).
        """
        length, sinks, size = self.length, self.layout.sink_tokens, self.layout.page_size
        first, behind = self._filled_by(len(keys))
        if first == behind:
            return first, np.empty((0, self.page_format.page_nbytes), np.uint8)
        # The first of them may have begun in earlier steps, or in this one behind its sink tokens.
        begin = sinks + first * size
        whole = []
        for old, new in zip(self.ring.read(min(begin, length), length), (keys, values), strict=True):
            tokens = np.concatenate((old, new[max(begin - length, 0) :]))
            whole.append(tokens[: (behind - first) * size].reshape(behind - first, size, *new.shape[1:]))
        return first, self.quantizer.pack(self.page_format, *whole)

    def _filled_by(self, tokens: int) -> tuple[int, int]:
        """Numbers of the first page that new tokens fill, and of the one behind the last."""
        inside, size = self.length - self.layout.sink_tokens, self.layout.page_size
        return max(inside, 0) // size, max(inside + tokens, 0) // size

    def overwritten_by_codes(self) -> None:
        """The layer's tokens have become more: pages of codes that have left the ring are lost."""
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
        return self.table.read(self.slot_of(number))

    def restore_pages(self, pages: Iterable[tuple[int, NDArray[np.uint8]]], intact: int) -> None:
        """Fill an empty page table.

        Args:
            pages: Number behind the sink tokens, and what `read_page` returned.
            intact: As the property.
        """
        for number, content in pages:
            self.table.fill(self.slot_of(number), content)
        self._intact = intact

    def slot_of(self, number: int) -> int:
        """Return the slot of a page of codes by its number behind the sink tokens."""
        return number % self.layout.ring_slots

    def first_page(self, position: int) -> int:
        """Return the number of the oldest page of codes that a query at `position` sees."""
        return (self.layout.first_visible(position) - self.layout.sink_tokens) // self.layout.page_size

    def _page_start(self, position: int) -> int:
        """The first position of a position's page; 0 among the sink tokens."""
        sinks, size = self.layout.sink_tokens, self.layout.page_size
        return sinks + (position - sinks) // size * size if position >= sinks else 0


def in_float16(given: NDArray[Any]) -> NDArray[Any]:
    """Return tokens in float16, contiguous; what is too large for it becomes infinite."""
    if given.dtype == FLOAT16:
        return np.ascontiguousarray(given)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(given, FLOAT16)


def check_finite(name: str, tokens: NDArray[Any]) -> None:
    """See that tokens in float16, (..., T, Hkv, D), can be quantized.

    Raises:
        ValueError: Some are not finite.
    """
    found = np.argwhere(~np.isfinite(tokens))
    if len(found):
        *_, token, head, _ = found[0]
        raise ValueError(
            f"{name} must be finite in float16 to be quantized, at most 65504; "
            f"got {tokens[tuple(found[0])]} in token {token}, head {head}"
        )
