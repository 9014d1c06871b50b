"""Copies arrays in device memory between layouts: what a kernel cannot read where it lies, and what it padded.

The attention kernels read and write rows of a multiple of 8 elements that start at multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import int32, int64
from numba.cuda import types

from numbaflash.device_arrays import DeviceArray

from . import ptx

__all__ = ["CopyRows"]

_WARPS = 4


@dataclass(frozen=True)
class CopyRows:
    """The kernel that copies (batch, tokens, heads, dim) arrays, and how it is launched; one warp a row.

    Rows of the target that are longer than the source's end in zeros; of those that are shorter the rest is left out.

    Attributes:
        itemsize: Bytes of an element, 2 or 4.
    """

    itemsize: int

    threads = 32 * _WARPS
    blocks = 8
    shared_bytes = 0

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*[int64] * 9, *[int32] * 4, int64)

    def grid(self, source: DeviceArray) -> int:
        """Return the blocks of a launch."""
        batch, tokens, heads, _ = source.shape
        return -(-batch * tokens * heads // _WARPS)

    def arguments(self, source: DeviceArray, target: DeviceArray) -> list[np.generic]:
        """Return the kernel's arguments; the arrays have the same batch, tokens and heads and do not overlap."""
        batch, tokens, heads, length = source.shape
        return [
            *map(np.int64, (source.address, *source.strides)),
            *map(np.int64, (target.address, *target.strides[:3])),
            *map(np.int32, (tokens, heads, min(length, target.shape[3]), target.shape[3])),
            np.int64(batch * tokens * heads),
        ]

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        ITEMSIZE, WARPS = self.itemsize, _WARPS
        load, store = (
            (ptx.load_global_b16, ptx.store_global_b16)
            if ITEMSIZE == 2
            else (ptx.load_global_b32, ptx.store_global_b32)
        )

        def copy_rows(
            source, from_batch, from_token, from_head, from_element, target, to_batch, to_token, to_head,
            tokens, heads, filled, length, rows,
        ):  # fmt: skip
            thread = ptx.thread_x()
            row = int64(ptx.block_x()) * WARPS + (thread >> 5)
            if row < rows:
                batch, token, head = row // (int64(tokens) * heads), row // heads % tokens, row % heads
                origin = source + batch * from_batch + token * from_token + head * from_head
                place = target + batch * to_batch + token * to_token + head * to_head
                for i in range(thread & 31, length, 32):
                    value = load(origin + i * from_element) if i < filled else 0
                    store(place + i * ITEMSIZE, value)

        return copy_rows
