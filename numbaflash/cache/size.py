"""The bytes of a cache, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .arguments import storage_dtype
from .layout import RingLayout, raw_layout
from .page_format import BITS
from .quantizers import Quantizer, quantizer_of

__all__ = ["LayerNbytes", "layer_nbytes"]


@dataclass(frozen=True)
class LayerNbytes:
    """Bytes of one layer's pages.

    Attributes:
        page: Of a page of keys and values in the storage dtype, scales included.
        pages: Most pages of them.
        page_size: Tokens of a page.
        raw_page: Of a page in float16 beside those of codes; 0 where the storage dtype is a float.
        raw_pages: Most pages of them: sink tokens, and the newest tokens.
    """

    page: int
    pages: int
    page_size: int
    raw_page: int = 0
    raw_pages: int = 0

    @property
    def token(self) -> Fraction:
        """Bytes of one token in the storage dtype, exactly: a page's share."""
        return Fraction(self.page, self.page_size)

    @property
    def total(self) -> int:
        """Bytes once the ring is full."""
        return self.page * self.pages + self.raw_page * self.raw_pages


def layer_nbytes(
    kv_heads: int, head_dim: int, layout: RingLayout, dtype: str, quantizer: Quantizer | str | None = None
) -> LayerNbytes:
    """Return the bytes of one layer of a cache; with `RingKVCache` of the same arguments they agree to the byte.

    Args:
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value.
        layout: Capacity, sink tokens, page size and rollback.
        dtype: Storage dtype by name.
        quantizer: Of int8 and int4; None: "group". No channel scales are asked for.

    Raises:
        ValueError: There is no such dtype or quantizer, or its group does not divide head_dim.
    """
    size = layout.page_size
    if dtype not in BITS:
        itemsize = storage_dtype(dtype).itemsize
        return LayerNbytes(2 * kv_heads * size * head_dim * itemsize, layout.slots, size)
    if not isinstance(quantizer, Quantizer):
        unit = np.ones((1, kv_heads, head_dim), np.float32) if (quantizer or "").startswith("awq") else None
        quantizer = quantizer_of(quantizer or "group", unit)
    return LayerNbytes(
        page=quantizer.page_format(dtype, kv_heads, size, head_dim).page_nbytes,
        pages=layout.ring_slots,
        page_size=size,
        raw_page=2 * kv_heads * size * head_dim * 2,
        raw_pages=raw_layout(layout).slots,
    )
