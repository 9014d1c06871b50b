"""A page of quantized keys and values, to the byte: the codes of each head, and their scales beside them.

Head by head: `page_size` rows of a key's codes, the keys' scales, their offsets; then values alike. What the fields
mean and how codes lie in a row is said where the kernels read them, at `numbaflash.cpu.Codes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "GROUP_SIZES", "PageFormat", "Quantized"]

# Storage dtypes by name, and the bits of a code.
BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)

_BLOCK = 32
_PARAMETER = np.dtype(np.float16)


class Quantized(NamedTuple):
    """Codes of (pages, tokens, kv_heads, head_dim) keys or values, and what they mean.

    `scales` and `offsets`, float16, are (pages, kv_heads, head_dim) by channel or (pages, tokens, kv_heads, groups);
    `offsets` is None where codes are symmetric.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    offsets: NDArray[np.float16] | None


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

    def pack(self, keys: Quantized, values: Quantized) -> NDArray[np.uint8]:
        """Lay whole pages out, (pages, page_nbytes)."""
        pages = len(keys.codes)
        packed = np.empty((pages, self.page_nbytes), np.uint8)
        split = self.kv_heads * self.key_nbytes
        self._pack(packed[:, :split].reshape(pages, self.kv_heads, -1), keys)
        self._pack(packed[:, split:].reshape(pages, self.kv_heads, -1), values)
        return packed

    def _pack(self, target: NDArray[np.uint8], content: Quantized) -> None:
        codes = content.codes.swapaxes(1, 2)
        if self.bits == 4:
            halves = codes.reshape(*codes.shape[:3], -1, 2, _BLOCK // 2)
            codes = halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)
        pages = len(codes)
        target[:, :, : self.codes_nbytes] = codes.reshape(pages, self.kv_heads, -1)
        at = self.codes_nbytes
        for parameters in (content.scales, content.offsets):
            if parameters is None:
                continue
            if parameters.ndim == 4:
                parameters = parameters.transpose(0, 2, 3, 1)
            raw = np.ascontiguousarray(parameters).reshape(pages, self.kv_heads, -1).view(np.uint8)
            target[:, :, at : at + raw.shape[-1]] = raw
            at += raw.shape[-1]

    def _parameters_nbytes(self, scales: int) -> int:
        return scales * _PARAMETER.itemsize * (1 if self.symmetric else 2)
