"""A page of quantized keys and values, to the byte: the codes of each head, and their scales beside them.

Head by head: `page_size` rows of a key's codes, the keys' scales, their offsets; then values alike. What the fields
mean and how codes lie in a row is said where the kernels read them, at `numbaflash.cpu.Codes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..cpu.encode import encode

__all__ = ["BITS", "GROUP_SIZES", "PageFormat", "inverses_of", "offsets_of"]

# Storage dtypes by name, and the bits of a code.
BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)

_PARAMETER = np.dtype(np.float16)


@dataclass(frozen=True)
class PageFormat:
    """Shape of a page of codes.

    Attributes:
        bits: Of a code, 8 or 4.
        key_group: Elements of a key that share a scale; 0: each channel has one for all tokens of the page.
        value_group: Elements of a value that share a scale.
        symmetric: No offsets.
        kv_heads: Heads of keys and values.
        page_size: Tokens of a page.
        head_dim: Elements of a key and of a value, a multiple of both groups and of 32.
    """

    bits: int
    key_group: int
    value_group: int
    symmetric: bool
    kv_heads: int
    page_size: int
    head_dim: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's codes of one head's key, or value."""
        return self.head_dim * self.bits // 8

    @property
    def codes_nbytes(self) -> int:
        """Bytes of all codes of one head's keys, or values."""
        return self.page_size * self.row_nbytes

    @cached_property
    def key_nbytes(self) -> int:
        """Bytes of one head's keys with their scales."""
        scales = self.page_size * self.head_dim // self.key_group if self.key_group else self.head_dim
        return self.codes_nbytes + self._parameters_nbytes(scales)

    @cached_property
    def value_nbytes(self) -> int:
        """Bytes of one head's values with their scales."""
        return self.codes_nbytes + self._parameters_nbytes(self.page_size * self.head_dim // self.value_group)

    @cached_property
    def page_nbytes(self) -> int:
        """Bytes of a page."""
        return self.kv_heads * (self.key_nbytes + self.value_nbytes)

    def parts(self, pages: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return views of whole pages, (n, page_nbytes): keys and values, (n, kv_heads, bytes) each."""
        split = self.kv_heads * self.key_nbytes
        keys, values = pages[:, :split], pages[:, split:]
        return keys.reshape(len(pages), self.kv_heads, -1), values.reshape(len(pages), self.kv_heads, -1)

    def write_part(
        self,
        part: NDArray[np.uint8],
        x: NDArray[np.float32],
        group: int,
        scales: NDArray[np.float16],
        offsets: NDArray[np.float16] | None,
    ) -> None:
        """Quantize keys or values of whole pages.

        Args:
            part: Of `parts`, written.
            x: (n, page_size, kv_heads, head_dim), contiguous.
            group: `key_group` or `value_group`.
            scales: (n, kv_heads, head_dim) by channel, else (n, page_size, kv_heads, groups).
            offsets: Likewise; None where codes are symmetric.
        """
        pages, page_size, kv_heads, head_dim = x.shape
        inverses, zeros = inverses_of(scales), offsets_of(scales, offsets, self.bits)
        tables = inverses.ctypes.data, zeros.ctypes.data
        places = part.ctypes.data, *part.strides[:2]
        encode(x.ctypes.data, pages, page_size, kv_heads, head_dim, group, *tables, self.bits, *places)
        at = self.codes_nbytes
        for parameters in (scales, offsets):
            if parameters is None:
                continue
            if group:
                parameters = parameters.transpose(0, 2, 3, 1)
            raw = np.ascontiguousarray(parameters).reshape(pages, kv_heads, -1).view(np.uint8)
            part[:, :, at : at + raw.shape[-1]] = raw
            at += raw.shape[-1]

    def _parameters_nbytes(self, scales: int) -> int:
        return scales * _PARAMETER.itemsize * (1 if self.symmetric else 2)


def inverses_of(scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return 1 / scale; 0 where a scale is 0."""
    wide = scales.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)


def offsets_of(scales: NDArray[np.float16], offsets: NDArray[np.float16] | None, bits: int) -> NDArray[np.float32]:
    """Return the offsets, which follow from the scales where codes are symmetric."""
    if offsets is not None:
        return offsets.astype(np.float32)
    return scales.astype(np.float32) * np.float32(-(2 ** (bits - 1)))
